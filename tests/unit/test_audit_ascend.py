"""The audit of operations: what it reads from a graph, and what it finds odd."""

from tools.audit_ascend import Use, findings, primitives


def test_an_odd_dtype_is_found():
    uses = {"Conv2DExt": Use(1, {"Float32"}), "Load": Use(1, {"Float64"}), "Add": Use(1, {"Float64"})}
    assert findings(uses) == ["Add: has Float64"]


def test_primitives_are_read_from_a_graph_with_their_dtypes():
    ir = (
        "  %0(y) = PrimFunc_MatMul(%para1_x, %para2_w, Bool(0), Bool(1)) cnode_attrs: {checkpoint: Bool(1)}\n"
        "      : (<Tensor[Float16], (2, 3)>, <Ref[Tensor[Float16]], (4, 3)>) -> (<Tensor[Float32], (2, 4)>)\n"
        "      # In file a.py:1~2, 3~4/    y = Relu(x)/\n"
        "  %1(z) = Conv2D(%0, %0) primitive_attrs: {pad: (1, 1)}\n"
        "      : (<Tensor[Float32], (2, 4)>, <Tensor[Float32], (2, 4)>) -> (<Tensor[Float32], (2, 4)>)\n"
    )
    found = primitives(ir)
    assert {name: (use.count, use.dtypes) for name, use in found.items()} == {
        "MatMul": (1, {"Float16", "Float32"}),
        "Conv2D": (1, {"Float32"}),
    }
