"""Products by oneDNN against torch's own, in every order of memory."""

from unittest.mock import Mock

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from segraft.adapters import products
from segraft.adapters.linear import Dense
from segraft.adapters.products import ENOUGH, FEW_ROWS, LONG, is_fast, is_left_to_torch, product, serves

SIDES = 170, 1 + ENOUGH // (170 * 180), 180
"""m, k, n of a product just large enough."""

needs_onednn = pytest.mark.skipif(not products.HAS_ONEDNN, reason="this torch or processor is without oneDNN")

# Every way in which a matrix [m, n] can lie in memory.
LAYOUTS = {
    "rows": lambda draw, m, n: draw(m, n),
    "columns": lambda draw, m, n: draw(n, m).t(),
    "rows with gaps": lambda draw, m, n: draw(m, n + 3)[:, 2:-1],
    "columns with gaps": lambda draw, m, n: draw(n, m + 3)[:, 1:-2].t(),
    "every other row": lambda draw, m, n: draw(2 * m, n)[::2],
    "every other column": lambda draw, m, n: draw(m, 2 * n)[:, ::2],
    "gaps in both": lambda draw, m, n: draw(2 * n, 3 * m)[::2, ::3].t(),
    "one of many": lambda draw, m, n: draw(m, n, 3)[..., 1],
    "from the middle of memory": lambda draw, m, n: draw(1 + m * n)[1:].view(m, n),
    "one row": lambda draw, m, n: draw(1, n).expand(m, n),
    "one column": lambda draw, m, n: draw(m, 1).expand(m, n),
    "one number": lambda draw, m, n: draw(1, 1).expand(m, n),
}


def drawing(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator).to(dtype)


def assert_is_the_product(found, a, b):
    """Within what rounding each of the k products and sums once can cost."""
    assert (found.shape, found.dtype) == ((a.shape[0], b.shape[1]), a.dtype)
    exact, largest = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    bound = (a.shape[1] + 2) * torch.finfo(a.dtype).eps * largest
    assert bool(((found.double() - exact).abs() <= bound).all())


def pair(m, k, n, left="rows", right="rows", dtype=torch.float32):
    return LAYOUTS[left](drawing(0, dtype), m, k), LAYOUTS[right](drawing(1, dtype), k, n)


@pytest.mark.parametrize("right", LAYOUTS)
@pytest.mark.parametrize("left", LAYOUTS)
def test_a_product_is_right_however_its_sides_lie_in_memory(left, right):
    a, b = pair(*SIDES, left, right)
    assert serves(a, b) == products.HAS_ONEDNN
    assert_is_the_product(product(a, b), a, b)


@given(
    st.sampled_from(sorted(LAYOUTS)), st.sampled_from(sorted(LAYOUTS)), st.integers(1, 600), st.integers(1, 600),
    st.sampled_from([0.5, 0.99, 1.0, 1.01, 2.0]),
)  # fmt: skip
def test_a_product_is_right_around_the_size_from_which_on_onednn_serves(left, right, m, n, times):
    k = max(1, round(times * ENOUGH / (m * n)))
    assume(k <= 5000)
    a, b = pair(m, k, n, left, right)
    assert_is_the_product(product(a, b), a, b)


@given(
    st.sampled_from(sorted(LAYOUTS)), st.sampled_from(sorted(LAYOUTS)),
    st.integers(1, 40), st.integers(1, 40), st.integers(1, 40),
)  # fmt: skip
def test_onednn_is_right_in_every_size(left, right, m, k, n):
    """Those that are too small to pay, too."""
    a, b = pair(m, k, n, left, right)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "ENOUGH", 1)
        patch.setattr(products, "FEW_ROWS", 1)
        assert serves(a, b) == products.HAS_ONEDNN
        assert_is_the_product(product(a, b), a, b)


@pytest.mark.parametrize("right", ["rows", "columns", "rows with gaps", "columns with gaps"])
@pytest.mark.parametrize("left", ["rows", "columns", "rows with gaps", "columns with gaps"])
@pytest.mark.parametrize(("m", "n"), [(1, 70), (70, 1), (FEW_ROWS - 1, 70), (70, FEW_ROWS), (70, 70), (1, 1)])
def test_few_rows_or_columns(monkeypatch, m, n, left, right):
    monkeypatch.setattr(products, "ENOUGH", 1)
    for k in (1, 80):
        a, b = pair(m, k, n, left, right)
        assert_is_the_product(product(a, b), a, b)


@pytest.mark.parametrize(("m", "k", "n"), [(0, 5, 4), (5, 0, 4), (5, 4, 0), (0, 0, 4), (0, 0, 0), (0, 3000, 3000)])
def test_where_there_is_nothing_to_multiply(m, k, n):
    a, b = torch.ones(m, k), torch.ones(k, n)
    assert not serves(a, b)
    assert torch.equal(product(a, b), torch.zeros(m, n))


@pytest.mark.parametrize("right", ["rows", "columns", "gaps in both"])
@pytest.mark.parametrize("left", ["rows", "columns", "gaps in both"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_left_to_torch(dtype, left, right):
    a, b = pair(*SIDES, left, right, dtype)
    assert not serves(a, b)
    assert not is_fast(a)
    assert torch.equal(product(a, b), a @ b)


def test_what_torch_refuses_is_refused():
    a, b = pair(200, 200, 200)
    for left, right in ((a, b.double()), (a.double(), b), (a, b[:-1]), (a[:, :-1], b)):
        with pytest.raises(RuntimeError):
            product(left, right)


@pytest.mark.parametrize("of_b", [False, True])
@pytest.mark.parametrize("of_a", [False, True])
def test_gradients_through_a_product_are_torchs(of_a, of_b):
    a, b = pair(*SIDES)
    inputs = [each.requires_grad_() for each, wanted in ((a, of_a), (b, of_b)) if wanted]
    assert serves(a, b) == (products.HAS_ONEDNN and not inputs)
    found = product(a, b)
    assert found.requires_grad == bool(inputs)
    if inputs:
        g = drawing(2)(*found.shape)
        for value, expected in zip(
            torch.autograd.grad(found, inputs, g), torch.autograd.grad(a @ b, inputs, g), strict=True
        ):
            assert torch.equal(value, expected)


@needs_onednn
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_where_no_gradient_is_recorded_parameters_are_served(context):
    a, b = (each.requires_grad_() for each in pair(*SIDES))
    with context():
        assert serves(a, b)
        found = product(a, b)
    assert not found.requires_grad
    assert_is_the_product(found, a.detach(), b.detach())


@needs_onednn
def test_what_onednn_serves(monkeypatch):
    def one(m, k, n):
        return serves(*(torch.ones(1, 1).expand(shape) for shape in ((m, k), (k, n))))

    assert one(128, ENOUGH >> 14, 128)
    assert not one(128, (ENOUGH >> 14) - 1, 128)
    monkeypatch.setattr(products, "ENOUGH", 1)
    assert one(FEW_ROWS, 20, 30)
    assert one(30, 20, FEW_ROWS)
    assert not one(FEW_ROWS - 1, 20, 30)
    assert not one(30, 20, FEW_ROWS - 1)
    assert one(30, LONG, 30)
    assert not one(30, LONG + 1, 30)


@needs_onednn
@pytest.mark.parametrize("sides", [SIDES, SIDES[::-1]], ids=["b larger", "a larger"])
@pytest.mark.parametrize("right", LAYOUTS)
@pytest.mark.parametrize("left", LAYOUTS)
def test_onednn_is_given_rows_and_what_is_dense(monkeypatch, sides, left, right):
    """Else it takes a thousand times as long."""
    by_onednn = Mock(side_effect=lambda rows, columns, *_: rows @ columns.t())
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", by_onednn)
    a, b = pair(*sides, left, right)
    assert_is_the_product(product(a, b), a, b)
    rows, columns = by_onednn.call_args.args[:2]
    assert rows.is_contiguous()
    assert columns.is_contiguous() or columns.t().is_contiguous()


def test_a_tensor_is_fast_where_onednn_is(monkeypatch):
    x = torch.ones(2, 2)
    assert is_fast(x) == products.HAS_ONEDNN
    monkeypatch.setattr(products, "HAS_ONEDNN", True)
    assert is_fast(x)
    assert not is_fast(x.to("meta"))
    monkeypatch.setattr(products, "HAS_ONEDNN", False)
    assert not is_fast(x)


@pytest.mark.parametrize("right", ["rows", "columns", "gaps in both"])
@pytest.mark.parametrize("left", LAYOUTS)
def test_without_onednn_torch_multiplies(monkeypatch, left, right):
    monkeypatch.setattr(products, "HAS_ONEDNN", False)
    a, b = pair(*SIDES, left, right)
    assert not serves(a, b)
    assert torch.equal(product(a, b), a @ b)


@pytest.mark.parametrize("right", ["rows", "columns", "gaps in both"])
@pytest.mark.parametrize("left", LAYOUTS)
def test_the_result_has_memory_of_its_own_and_the_inputs_stay(left, right):
    a, b = pair(*SIDES, left, right)
    before = a.clone(), b.clone()
    found, again = product(a, b), product(a, b)
    assert torch.equal(a, before[0])
    assert torch.equal(b, before[1])
    memory = [each.untyped_storage().data_ptr() for each in (found, again, a, b)]
    assert len(set(memory)) == 4
    found.fill_(7)  # each number has a place
    assert torch.equal(a, before[0])
    assert torch.equal(b, before[1])
    assert_is_the_product(again, a, b)


def test_what_is_not_finite_stays_where_it_belongs():
    a, b = pair(*SIDES)
    a[3, 5], a[9, 0], b[-1, -1] = torch.inf, torch.nan, torch.inf
    found = product(a, b)
    assert torch.equal(found.isfinite(), (a @ b).isfinite())
    assert torch.equal(found.isnan(), (a @ b).isnan())


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is:DeprecationWarning")  # of torch itself, by jvp
def test_torch_func_meets_torchs_own_products():
    a, b = pair(*SIDES)
    step = drawing(2)(*a.shape)
    torch.testing.assert_close(torch.func.jvp(lambda x: product(x, b), (a,), (step,)), (a @ b, step @ b))
    both = torch.stack([a, step])
    torch.testing.assert_close(torch.vmap(product, (0, None))(both, b), both @ b)


def test_compilers_and_exporters_meet_torchs_own_products(monkeypatch):
    a, b = pair(*SIDES)
    monkeypatch.setattr("segraft.adapters.products.is_compiling", lambda: True)
    assert not serves(a, b)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="all is left to torch")
@pytest.mark.parametrize(
    ("x", "weight"),
    [
        pytest.param((1, 192, 8, 8, 8), (192, 192, 3, 3, 3), id="small"),
        pytest.param((2, 192, 8, 8, 8), (192, 192, 3, 3, 3), id="in-a-batch"),
        pytest.param((1, 320, 8, 8, 8), (4, 320, 3, 3, 3), id="just"),
        pytest.param((1, 321, 8, 8, 8), (4, 321, 3, 3, 3), id="just-not"),
        pytest.param((1, 64, 8, 16, 200), (64, 64, 3, 3, 3), id="the-last-is-not-counted"),
        pytest.param((1, 64, 8, 8, 8), (64, 64, 3, 5, 5), id="large-kernel"),
        pytest.param((1, 64, 8, 8, 8), (64, 64, 5, 3, 5), id="not-in-both"),
        pytest.param((1, 64, 16, 16), (64, 64, 3, 3), id="2d"),
    ],
)
def test_what_torch_takes_itself(x, weight):
    """Held against torch, which may choose otherwise some day."""
    dims = len(x) - 2
    geometry = [[1] * dims, [1] * dims, [1] * dims, False, [0] * dims, 1, None]
    chosen = torch._C._select_conv_backend(torch.zeros(x), torch.zeros(weight), None, *geometry)
    mine = chosen not in (torch._C._ConvBackend.Mkldnn, torch._C._ConvBackend.MkldnnEmpty)
    if dims == 3:
        assert is_left_to_torch(x, weight) == mine
    else:
        assert not is_left_to_torch(x, weight)  # small images in two dimensions take no time


@pytest.mark.parametrize("shape", [(), (700,), (2, 350), (5, 7, 20)], ids=str)
@pytest.mark.parametrize("biased", ["rows", "one of many", "one number", None])
@pytest.mark.parametrize("lies", ["rows", "columns", "every other column"])
def test_a_linear_layer_in_training_is_torchs_up_to_rounding(shape, biased, lies):
    draw = drawing(0)
    x, weight = draw(*shape, 90), LAYOUTS[lies](draw, 80, 90)
    bias = LAYOUTS[biased](draw, 1, 80)[0] if biased else None
    assert serves(x.reshape(-1, 90), weight.t()) == (products.HAS_ONEDNN and bool(shape))
    found = Dense().output(x, weight, bias)
    assert found.shape == (*shape, 80)
    torch.testing.assert_close(found, nn.functional.linear(x, weight, bias), rtol=1e-5, atol=1e-5)


def test_a_linear_layer_that_records_gradients_is_torchs():
    x, weight = drawing(0)(700, 90), drawing(1)(80, 90).requires_grad_()
    assert Dense().output(x, weight, None).grad_fn is not None
