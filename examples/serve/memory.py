"""What a replica's process holds and what a batch adds: `python -m examples.serve.memory [--size base]` prints a table.

"embedded" is the model in the package; "base" a LLaVA with random weights of usual size (ViT-B/16 of 224 pixels, 4
decoder layers 768 wide), for memory and time alone.
"""

import argparse
import ctypes
import gc
import statistics
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path

import torch
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from examples.serve.app import TunedModel
from vqfast import zoo
from vqfast.zoo.train import IMAGE, VOCABULARY, build_processor

WIDTH = {"hidden_size": 768, "num_attention_heads": 12}
SIDE, PATCH = 224, 16
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def save_base(folder: Path) -> None:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(**WIDTH, intermediate_size=3072, num_hidden_layers=12, image_size=SIDE, patch_size=PATCH)
    text = LlamaConfig(**WIDTH, intermediate_size=2048, num_hidden_layers=4, vocab_size=len(VOCABULARY))
    tokens = (SIDE // PATCH) ** 2
    LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=tokens)
    ).save_pretrained(folder)
    processor, size = build_processor(), {"height": SIDE, "width": SIDE}
    processor.image_processor = CLIPImageProcessorPil(size=size, crop_size=size)
    processor.patch_size = PATCH
    processor.save_pretrained(folder)


def megabytes(field: str) -> float:
    """VmRSS, the memory that is resident, or VmHWM, the most there was since the last reset."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024 / 1e6


def settled() -> float:
    """MB resident, without what was freed and malloc keeps."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    RESET.write_text("5")  # VmHWM := VmRSS
    return megabytes("VmRSS")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("embedded", "base"), default="embedded")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 16], help="ascending")
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.size == "base":
            save_base(Path(folder))
        libraries = settled()
        tuned = TunedModel(Path(folder) if options.size == "base" else None, max_new_tokens=2)
        drawn = islice(cycle(zoo.questions("test")), max(options.batches))
        rows = [tuned.encoded(image, zoo.QUESTIONS[0]) for image, _, _ in drawn]
        tuned.model.generate(**rows[0], max_new_tokens=2)  # reads the weights
        loaded = settled()
    weights = sum(p.numel() * p.element_size() for p in tuned.model.parameters()) / 1e6
    print(f"{torch.get_num_threads()} thread(s); libraries {libraries:.0f} MB, weights {weights:.0f} MB")
    print(f"process once the untuned model has answered: {loaded:.0f} MB")
    print("| batch | ms | answers per second | most memory beyond the loaded model, MB | per request, MB | kept, MB |")
    print("|---|---|---|---|---|---|")
    for batch in options.batches:
        times = []
        for _ in range(options.repeat + 1):
            start = time.perf_counter()
            tuned.answers(rows[:batch])
            times.append(time.perf_counter() - start)
        seconds, extra = statistics.median(times[1:]), megabytes("VmHWM") - loaded
        row = (batch, 1000 * seconds, batch / seconds, extra, extra / batch, settled() - loaded)
        print("| {} | {:.0f} | {:.2f} | {:.0f} | {:.0f} | {:.0f} |".format(*row))


if __name__ == "__main__":
    main()
