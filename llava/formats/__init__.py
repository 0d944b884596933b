"""On-disk formats. Each module reads and writes one format. `FORMATS` lists the formats in detection order."""

from llava.formats.clip import Clip
from llava.formats.delta import Delta
from llava.formats.format import Format
from llava.formats.gguf import Gguf
from llava.formats.gpt_fast import GptFast
from llava.formats.internlm2 import InternLM2
from llava.formats.llama import Llama
from llava.formats.llava import Llava
from llava.formats.llava_hf import LlavaHf
from llava.formats.lora import Lora
from llava.formats.meta import Meta
from llava.formats.mpt import Mpt
from llava.formats.native import Native
from llava.formats.projector import Projector

FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        Native(),
        Lora(),
        Projector(),
        Clip(),
        Meta(),
        LlavaHf(),
        Mpt(),
        InternLM2(),
        Delta(),
        Llava(),
        Llama(),
        Gguf(),
        GptFast(),
    )
}
