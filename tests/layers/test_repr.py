"""What `print(model)` shows."""

from torch import nn

from ..support.models import build


def layers_of(model):
    return model.beit.encoder.layer


def test_repr_of_blocks_that_differ_in_drop_path_is_one():
    shown = repr(layers_of(build(drop_path_rate=0.1)))
    assert "(0-2): 3 x BeitLayer(" in shown
    assert "(drop_path): Identity() to BeitDropPath(p=0.1)\n" in shown
    assert shown.count("BeitLayer(") == 1


def test_repr_of_equal_blocks_has_the_lines_of_a_module_list():
    layers = layers_of(build())
    assert repr(layers) == repr(nn.ModuleList(layers)).replace("ModuleList", "BeitLayers", 1)


def test_repr_of_blocks_that_differ_elsewhere_shows_each():
    model = build(drop_path_rate=0.1)
    layers_of(model)[1].layernorm_after = nn.Identity()
    shown = repr(layers_of(model))
    assert shown.count("BeitLayer(") == 3
    assert "(1): BeitLayer(" in shown
    assert "(drop_path): BeitDropPath(p=0.05)\n" in shown
    layers_of(model)[2] = nn.Identity()
    assert "\n  (2): Identity()\n)" in repr(layers_of(model))


def test_repr_of_a_bias_shows_its_window():
    assert "BeitRelativePositionBias(window=(4, 6))" in repr(build(image_size=(32, 48)))
