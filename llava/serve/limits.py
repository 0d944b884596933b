"""What a request may ask for. Everything is checked before memory is taken for it."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of the server. A request beyond one of them gets an error with status 400, 413 or 429."""

    body_bytes: int = 32 * 2**20
    body_values: int = 150_000  # commas and opening brackets of a body: values take more memory than their text
    connections: int = 800  # below the number of open files that most systems allow
    head_s: float = 20.0  # seconds in which the head of a request has to arrive
    body_s: float = 30.0  # seconds in which a body has to arrive
    pictures: int = 16  # per request
    picture_bytes: int = 16 * 2**20  # of each file
    pixels: int = 50_000_000  # of each picture
    padded_pixels: int = 200_000_000  # of each picture with its edges, if the model sees squares; 3 bytes each
    picture_s: float = 20.0  # seconds for decoding and resizing one
    fetch_s: float = 10.0  # seconds for fetching one from a host that is allowed
    n: int = 16  # choices
    prompts: int = 64  # prompts of a request for completions
    stops: int = 16  # stop strings
    stop_chars: int = 256  # of each
    logit_bias: int = 1024  # tokens
    top_logprobs: int = 20
    answer_values: int = 1_000_000  # tokens of an answer, each with as many log-probabilities as are listed
    schema_bytes: int = 64 * 2**10  # of a JSON schema
    map_values: int = 2_000_000  # numbers in the maps of an explanation
    map_bytes: int = 2**30  # memory for the attention that an explanation captures
    explanations: int = 4  # that run at the same time; those beyond get 429
    upload_body_bytes: int = 512 * 2**20  # of the pictures that the page sends at a time, such as a folder
    upload_s: float = 600.0  # seconds in which they have to arrive
    page_streams: int = 400  # open pages, each of which holds a connection; below `connections`, for the API's sake
    upload_bytes: int = 2**30  # of all pictures that visitors of the page have sent, on disk
    upload_files: int = 10_000  # the same, as files
    requests: int = 256  # choices that wait or run at the same time; those beyond get 429
    request_s: float = 600.0  # seconds until a request is ended
