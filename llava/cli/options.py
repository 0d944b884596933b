"""Options that several commands take."""

from typing import Annotated

import typer

Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="folder or hub id of a checkpoint; none: llava-tiny, in this package"),
]
Checkpoint = Annotated[str, typer.Argument(metavar="M", help="folder or hub id of a checkpoint")]
Base = Annotated[str | None, typer.Option("--base", help="language model that a delta, LoRA or projector belongs to")]
Adapters = Annotated[
    list[str] | None,
    typer.Option("--adapter", metavar="NAME=M", help="LoRA or projector to put on --model; may be given again"),
]
VisionTower = Annotated[str | None, typer.Option("--vision-tower", help="CLIP's folder or hub id")]
Template = Annotated[str | None, typer.Option("--template", help="conversation template, by name")]
DType = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N")]
Quantize = Annotated[str | None, typer.Option("--quantize", help="quantisation of the weights")]
Revision = Annotated[str | None, typer.Option("--revision", help="branch, tag or commit on the hub")]
Force = Annotated[bool, typer.Option("--force", help="go on in spite of unknown tensors, NaN, Inf, a doubtful base")]
ImageMode = Annotated[str | None, typer.Option("--image-mode", help="arithmetic for pictures: original or hf")]
Exif = Annotated[bool, typer.Option("--exif", help="turn pictures as their EXIF orientation says")]
LegacyStrip = Annotated[bool, typer.Option("--legacy-strip", help="white space as when v0 and v1.1 were trained")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object instead of text")]

MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", help="longest answer, in tokens")]
Temperature = Annotated[float, typer.Option("--temperature", help="0 takes the likeliest token")]
TopP = Annotated[float | None, typer.Option("--top-p", help="likeliest tokens that together reach this probability")]
TopK = Annotated[int | None, typer.Option("--top-k", help="so many likeliest tokens")]
MinP = Annotated[float | None, typer.Option("--min-p", help="tokens this share as likely as the likeliest")]
RepetitionPenalty = Annotated[float, typer.Option("--repetition-penalty", help="above 1: less repetition")]
Seed = Annotated[int | None, typer.Option("--seed", help="for the same answer again")]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="string that ends the answer; may be given again")]
