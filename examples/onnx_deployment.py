"""A trained teacher as an ONNX file, run without torch by onnxruntime: same outputs, at any batch size.

pip install onnx onnxscript onnxruntime
python examples/onnx_deployment.py --output encoder.onnx
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections import Counter
from pathlib import Path

import onnx
import onnxruntime
import torch
from torch import nn

from momentum_bn import MomentumTeacher


def trained_encoder(steps: int) -> nn.Module:
    """The network of a momentum teacher after some steps, ready for evaluation."""
    student = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 32), nn.BatchNorm1d(32)),
    )
    teacher = MomentumTeacher(student, total_iters=steps)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
    for view1, view2 in torch.rand(steps, 2, 16, 3, 15, 15):
        teacher.update()
        target1, target2 = teacher(view1), teacher(view2)
        similarity = torch.cosine_similarity(student(view1), target2) + torch.cosine_similarity(student(view2), target1)
        optimizer.zero_grad()
        (2 - similarity.mean()).backward()
        optimizer.step()
    return teacher.module.eval()


def main() -> None:
    """Trains, exports, runs and compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="file to write (default: a temporary one)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    encoder = trained_encoder(args.steps)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)

    with tempfile.TemporaryDirectory() as folder:
        path = args.output or Path(folder) / "encoder.onnx"
        torch.onnx.export(
            encoder,
            (torch.rand(2, 3, 15, 15),),
            path,
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=False,  # the weights in the same file
            dynamo=True,
            verbose=False,
        )
        model = onnx.load(path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    onnx.checker.check_model(model)
    operators = Counter(node.op_type for node in model.graph.node)
    print("operators: " + ", ".join(f"{count} {name}" for name, count in operators.items()))
    assert all(node.domain == "" for node in model.graph.node), "only standard ONNX operators"
    for batch in (1, 2, 33):
        images = torch.rand(batch, 3, 15, 15)
        (features,) = session.run(["features"], {"images": images.numpy()})
        with torch.no_grad():
            expected = encoder(images)
        difference = (torch.from_numpy(features) - expected).abs().max().item()
        print(f"batch of {batch}: largest difference to torch {difference:.1e}")
        torch.testing.assert_close(torch.from_numpy(features), expected, rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    main()
