"""Messages that no row of the table follows, each with the reason."""

_ZOO = "part of a command that `llava zoo show` prints; tests/journeys/test_zoo.py and tests/zoo check them"
_LABEL = "no advice: a label, or words that are exchanged"

EXCEPTIONS = {
    "start at most one process per GPU (--nproc-per-node {}), or pass --device cpu": "needs a machine with GPUs",
    "cannot be captured as a CUDA graph": "needs a GPU; tests/engine/test_fused.py, test_vision_graphs.py",
    "merge LoRA": _LABEL,
    "what --fix does": _LABEL,
    "start/end tokens": _LABEL,
    "set --set ": _LABEL,
    "pass --set ": _LABEL,
    "so this is a plain language model; select a template when loading it": "evidence in the output of inspect",
    "{}: ambiguous; specify one of {}": "at present, no two entries of the zoo have the same name",
    "wandb: {}; run `wandb login`, or set WANDB_MODE=offline": "wandb needs the network and an account",
    "contains the unknown tensor {}; convert the model again": "GGUF files are read only right after they were written",
    "this tokenizer cannot encode {} as ordinary text": "no tokenizer is known for which this happens",
    "hf download {}{} --local-dir {}": _ZOO,
    "hf download {} --local-dir {}": _ZOO,
    " --base {}": _ZOO,
    'llava ask photo.jpg "What is in the picture?" --model {}{}': _ZOO,
    'llava ask photo.jpg "What is in the picture?" --model {}-merged': _ZOO,
    "llava {} --base {} --target {}-merged --{} {}": _ZOO,
    "llava convert {} {}-native --to native{}": _ZOO,
    "--otlp-endpoint needs {}": "would install packages; tests/serve/test_traces.py",
    "pip install '{}[{}]'": "a line of the doctor's report, which would install packages",
    "the folder for compiled kernels {}": "needs environment variables; tests/cli/test_kernel_cache.py follows it",
}
