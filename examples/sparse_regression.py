"""Ridge, lasso and elastic net with exact zeros, on the diabetes data that ship with scikit-learn.

    python examples/sparse_regression.py             # writes results/sparse_regression.png

442 patients, 10 measurements, and with their products 55 features, most of them
useless. Gradient descent on the L1 penalty, which is what adding it to the loss does, leaves every
coefficient small and none zero; the proximal step of `attach(how="prox")` removes features. Its
fits are those of scikit-learn's own solvers.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_diabetes
from sklearn.linear_model import ElasticNet, Lasso
from sklearn.preprocessing import PolynomialFeatures
from torch import Tensor, nn

from fastnorm import L1, L1L2, L2, Regularizer, StandardScaler
from fastnorm.penalties import Rule

# Name, rule for a strength, how it is applied.
METHODS = {
    "no penalty": (lambda lam: L2(0.0), "grad"),
    "ridge, L2": (lambda lam: L2(lam, half=True), "grad"),
    "lasso, in gradient": (lambda lam: L1(lam), "grad"),
    "lasso, proximal": (lambda lam: L1(lam), "prox"),
    "elastic net, proximal": (lambda lam: L1L2.from_ratio(lam, 0.5, half=True), "prox"),
}


def load() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Standardized features and targets: training x and y, test x and y."""
    data = load_diabetes()
    features = PolynomialFeatures(interaction_only=True, include_bias=False).fit_transform(
        data.data
    )
    x, y = torch.from_numpy(features), torch.from_numpy(data.target).unsqueeze(1)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:332], order[332:]
    # The scale comes from the training part alone.
    scale_x, scale_y = StandardScaler(x.shape[1]).double(), StandardScaler(1).double()
    scale_x.fit(x[train])
    scale_y.fit(y[train])
    return scale_x(x[train]), scale_y(y[train]), scale_x(x[test]), scale_y(y[test])


def fit(x: Tensor, y: Tensor, rule: Rule, how: str, steps: int) -> nn.Linear:
    model = nn.Linear(x.shape[1], 1, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    largest = torch.linalg.matrix_norm(x, 2).item() ** 2 / len(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=1 / largest)
    Regularizer(model, rule).attach(optimizer, how)  # weights, not the bias
    for _ in range(steps):
        optimizer.zero_grad()
        loss = 0.5 * (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
    return model


def explained(model: nn.Linear, x: Tensor, y: Tensor) -> float:
    """R², the share of the variance that the model explains."""
    with torch.no_grad():
        return 1 - ((model(x) - y).square().mean() / y.var(correction=0)).item()


def main(arguments: list[str] | None = None) -> dict[str, int]:
    """Returns the number of exact zeros of each method."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--strength", type=float, default=0.05)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--output", type=Path, default=Path("results/sparse_regression.png"))
    parser.add_argument("--quick", action="store_true", help="few steps, for a test")
    args = parser.parse_args(arguments)
    strengths = torch.logspace(-3, 0, 3 if args.quick else 12, dtype=torch.float64).tolist()
    steps = min(args.steps, 200) if args.quick else args.steps
    x, y, x_test, y_test = load()
    models: dict[str, nn.Linear] = {}
    paths: dict[str, list[Tensor]] = {"ridge, L2": [], "lasso, proximal": []}
    console = Console()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("Fitting", total=len(METHODS) + len(paths) * len(strengths))
        for name, (rule, how) in METHODS.items():
            models[name] = fit(x, y, rule(args.strength), how, steps)
            progress.advance(task)
        for name, path in paths.items():
            rule, how = METHODS[name]
            for strength in strengths:
                path.append(fit(x, y, rule(strength), how, steps // 5).weight.detach()[0])
                progress.advance(task)

    table = Table(
        title=f"{len(x)} patients, {x.shape[1]} features, strength {args.strength:g}",
        caption="scikit-learn: largest difference from the solution of its own solver",
    )
    for column in ("method", "zeros", "Σ|w|", "R² train", "R² test", "scikit-learn"):
        table.add_column(column, justify="left" if column == "method" else "right")
    solvers = {
        "lasso, proximal": Lasso(args.strength, max_iter=100_000),
        "elastic net, proximal": ElasticNet(args.strength, l1_ratio=0.5, max_iter=100_000),
    }
    zeros = {}
    for name, model in models.items():
        weight = model.weight.detach()[0]
        zeros[name] = int((weight == 0).sum())
        distance = "-"
        if name in solvers:
            solution = torch.from_numpy(solvers[name].fit(x.numpy(), y[:, 0].numpy()).coef_)
            distance = f"{(weight - solution).abs().max().item():.0e}"
        scores = [f"{explained(model, *part):.3f}" for part in ((x, y), (x_test, y_test))]
        size = f"{weight.abs().sum().item():.2f}"
        table.add_row(name, f"{zeros[name]} / {len(weight)}", size, *scores, distance)
    console.print(table)
    draw(paths, strengths, args.output)
    console.print(f"Coefficients against strength: {args.output}")
    return zeros


def draw(paths: dict[str, list[Tensor]], strengths: list[float], output: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(paths), figsize=(10, 4), sharey=True, layout="constrained")
    for axis, (name, path) in zip(axes, paths.items(), strict=True):
        axis.semilogx(strengths, torch.stack(path), linewidth=1)
        left = [int((weight != 0).sum()) for weight in path]
        axis.set_title(f"{name}: {left[0]} to {left[-1]} features")
        axis.set_xlabel("strength λ")
    axes[0].set_ylabel("coefficient")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
