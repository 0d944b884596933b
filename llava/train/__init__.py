"""From a recipe and data to a trained model: samples, batches, the loop, what to go on from, the final export."""
