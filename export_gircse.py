"""Write a model as ONNX, for onnxruntime and transformers.js: a graph of the text and k steps in one file.

    python export_gircse.py --output_dir gircse-onnx --k 5
    python export_gircse.py --model you/your-gircse --output_dir out --k 20

The folder has `onnx/model.onnx` (float32), `onnx/model_fp16.onnx`, `onnx/model_quantized.onnx` (int8), and a tokenizer
for them; docs/onnx.md tells how to use it. Each file is compared with the model in PyTorch.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from gircse import ROOT
from gircse.command_line import lenient_console, local_path, parser_of
from gircse.loading import is_gircse, load, prompts_of
from gircse.onnx.folder import check_folder, export_onnx
from gircse.onnx.graph import OPSET, check_opset


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--model", default=str(ROOT), help="GIRCSE model, Hub id or folder; by default the one of this repo")
    add("--output_dir", type=local_path, required=True, help="a new folder, or that of an earlier export")
    add("--k", type=int, help="generated tokens, by default what the model's config says")
    add("--opset", type=int, default=OPSET, help=f"version of ONNX's operators (default: {OPSET})")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    lenient_console()
    options = parse(argv)
    check_opset(options.opset)
    check_folder(options.output_dir)  # before a large model is loaded
    if not is_gircse(options.model):
        raise ValueError(f"model={options.model!r} is no GIRCSE model: train one of it with train_gircse.py")
    model, processor = load(options.model, attn_implementation="eager")
    found = export_onnx(
        model, processor, options.output_dir, options.k, options.opset, prompts=prompts_of(options.model)
    )
    print(f"\n{'file':<28} {'MB':>9}  lowest cosine to PyTorch")
    for name, cosine in found.items():
        files = list((options.output_dir / "onnx").glob(f"{name}*"))
        size = sum(file.stat().st_size for file in files) / 1e6
        print(f"onnx/{name:<23} {size:>9.1f}  {cosine:.6f}" + ("" if files else ": left out, it overflows"))
    print(f"Saved to {options.output_dir}")


if __name__ == "__main__":
    main()
