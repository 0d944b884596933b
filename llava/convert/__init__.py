"""A resolved checkpoint into another folder: converted, merged with its base, or taken apart; results are verified."""
