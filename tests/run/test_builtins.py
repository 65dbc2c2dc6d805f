from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from noisescale.errors import InvalidInputError
from noisescale.run.builtins import BUILT_INS, build
from noisescale.run.builtins.language import standard_library_source
from noisescale.run.builtins.quadratic import exact_noise_scale


@pytest.fixture
def folder(tmp_path):
    """A data folder of drawn images and a text, in the files' own layout."""
    rng = np.random.default_rng(0)
    labels = np.arange(2100) % 10
    np.savez(
        tmp_path / "mnist.npz",
        x_train=rng.integers(0, 256, (2100, 28, 28), dtype=np.uint8),
        y_train=labels,
    )
    np.savez(
        tmp_path / "cifar10-subset.npz",
        x_train=rng.integers(0, 256, (2100, 32, 32, 3), dtype=np.uint8),
        y_train=labels[:, None],
    )
    (tmp_path / "tinyshakespeare.txt").write_text("To be, or not to be: é. " * 400)
    return tmp_path


@pytest.mark.parametrize("name", sorted(BUILT_INS))
def test_every_built_in_gives_a_finite_loss_and_gradient(name, folder):
    torch.manual_seed(0)
    workload = build(name, data=folder)
    assert workload.name == name
    assert workload.recipe.dataset_size == workload.train_size
    model = workload.model()
    batch = tuple(part[:5] for part in workload.train)
    loss = workload.loss(model, batch)
    loss.backward()
    assert loss.shape == ()
    assert math.isfinite(loss.item())
    assert all(parameter.grad is not None for parameter in model.parameters())
    if workload.metrics is not None:
        assert workload.metrics(model, batch)["error"].shape == (5,)


@pytest.mark.parametrize("name", ["digits", "digits-cnn", "chars"])
def test_the_loss_is_the_mean_over_examples(name):
    torch.manual_seed(0)
    workload = build(name)
    model = workload.model()
    together = workload.loss(model, tuple(part[:4] for part in workload.train))
    alone = [
        workload.loss(model, tuple(part[i : i + 1] for part in workload.train)) for i in range(4)
    ]
    torch.testing.assert_close(together, torch.stack(alone).mean())


def test_digits_is_the_documented_split_and_model():
    workload = build("digits")
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(1797)
    np.testing.assert_array_equal(workload.train[1], labels[order[:1437]])
    np.testing.assert_allclose(workload.evaluate[0], pixels[order[1437:]] / 16)
    assert [tuple(p.shape) for p in workload.model().parameters()] == [
        (64, 64),
        (64,),
        (10, 64),
        (10,),
    ]
    assert str(workload.target) == "validation_error<0.05"
    assert (workload.recipe.lr, workload.recipe.batch_size) == (0.5, 32)


def test_digits_cnn_is_the_documented_model():
    workload = build("digits-cnn")
    shapes = [tuple(p.shape) for p in workload.model().parameters() if p.ndim > 1]
    assert shapes == [(8, 1, 3, 3), (16, 8, 3, 3), (10, 256)]
    assert workload.recipe.momentum == 0.9


def test_images_are_scaled_and_the_last_ones_validate(folder):
    mnist = build("mnist", data=folder)
    assert (mnist.train_size, len(mnist.evaluate[0])) == (100, 2000)
    assert float(mnist.train[0].max()) <= 1
    cifar = build("cifar10", data=folder)
    assert cifar.train[0].shape == (100, 3, 32, 32)
    with np.load(folder / "cifar10-subset.npz") as archive:
        pixel = archive["x_train"][7, 3, 4, 2]
    assert float(cifar.train[0][7, 2, 3, 4]) == pytest.approx((pixel / 255 - 0.5) / 0.25, abs=1e-5)


def test_sequences_are_shifted_by_one_and_do_not_overlap(folder):
    workload = build("shakespeare", data=folder)
    inputs, following = workload.train
    torch.testing.assert_close(inputs[:, 1:], following[:, :-1])
    torch.testing.assert_close(inputs[1:, 0], following[:-1, -1])
    assert inputs.shape[1] == 64
    assert workload.recipe.unit == "sequences"


def test_the_character_model_does_not_see_the_future():
    torch.manual_seed(0)
    workload = build("chars")
    model = workload.model()
    first = workload.train[0][:1].clone()
    changed = first.clone()
    changed[0, 40] = (changed[0, 40] + 1) % 90
    with torch.no_grad():
        moved = (model(first) - model(changed)).abs().amax(dim=2)[0]
    assert float(moved[:40].max()) == 0
    assert float(moved[40:].min()) > 0


def test_default_text_is_ascii_and_always_the_same():
    text = standard_library_source()
    assert text == standard_library_source()
    assert len(text) > 500_000
    assert set(text) <= {"\n", *map(chr, range(32, 127))}


def test_chars_reads_a_text_of_the_users(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("abcd" * 500)
    workload = build("chars", text=str(file))
    assert workload.model().head.weight.shape == (4, 64)


@pytest.mark.parametrize(
    ("content", "words"), [(b"short", "characters"), (b"\xff" * 2000, "UTF-8")]
)
def test_chars_refuses_a_text_it_cannot_use(tmp_path, content, words):
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(InvalidInputError, match=words):
        build("chars", text=str(tmp_path / "bad.txt"))


def test_quadratic_exact_noise_scale_is_that_of_the_gradients():
    torch.manual_seed(0)
    workload = build("quadratic")
    model = workload.model()
    data = tuple(part[:50] for part in workload.train)
    gradients = []
    for i in range(50):
        (gradient,) = torch.autograd.grad(
            workload.loss(model, tuple(part[i : i + 1] for part in data)), model.weight
        )
        gradients.append(gradient.double().reshape(-1))
    rows = torch.stack(gradients)
    grad_sq, trace_cov = exact_noise_scale(model.weight, data)
    assert grad_sq == pytest.approx(float(rows.mean(0).square().sum()), rel=1e-4)
    assert trace_cov == pytest.approx(float(rows.var(0, correction=0).sum()), rel=1e-4)


def test_missing_data_folder_is_told(tmp_path):
    with pytest.raises(InvalidInputError, match=r"--data DIR"):
        build("mnist")
    with pytest.raises(InvalidInputError, match="does not exist"):
        build("mnist", data=tmp_path / "no")
    with pytest.raises(InvalidInputError, match=r"needs mnist\.npz"):
        build("mnist", data=tmp_path)


@pytest.mark.parametrize("kind", ["text", "lacks", "shape", "labels", "pickle"])
def test_a_bad_archive_is_told_in_one_line(tmp_path, kind):
    file = tmp_path / "mnist.npz"
    images = np.zeros((2100, 28, 28), np.uint8)
    labels = np.zeros(2100, np.int64)
    if kind == "text":
        file.write_text("hello")
    elif kind == "lacks":
        np.savez(file, x_train=images)
    elif kind == "shape":
        np.savez(file, x_train=images[:, :8], y_train=labels)
    elif kind == "labels":
        np.savez(file, x_train=images, y_train=labels + 11)
    else:
        np.savez(file, x_train=images, y_train=np.array([{}] * 2100))
    with pytest.raises(InvalidInputError, match=r"mnist\.npz") as caught:
        build("mnist", data=tmp_path)
    assert "\n" not in str(caught.value)
