"""VGG-11 (Simonyan & Zisserman 2015, "Very Deep Convolutional Networks", table 1, configuration A)."""

from collections import OrderedDict
from typing import Literal, Unpack

from torch import nn

from dlopt.basics.ranges import Fraction
from dlopt.models.layers import GlobalAveragePool, Norm, NormKeys, check_instance_norm, conv_norm_relu, image_shape
from dlopt.models.linear import Linear

_STAGES = ((64,), (128,), (256, 256), (512, 512), (512, 512))


class VGG11(nn.Sequential):
    """Eight 3x3 convolutions in five stages, each followed by 2x2 max-pooling, and the classifier.

    `classifier=imagenet` is the paper's: 7x7 maps, two layers of 4096 features with dropout. `classifier=small` is
    one linear layer on the averaged maps, as usual for CIFAR. Maps of one pixel are not pooled, so that 8x8 images
    work too. Images [B, C, H, W] -> [B, classes].

    Errors: UserError for samples that are not images, or instance normalization of maps of one pixel.
    """

    def __init__(
        self,
        *,
        input_shape: tuple[int, ...],
        classes: int,
        classifier: Literal["small", "imagenet"],
        dropout: Fraction,
        **norm: Unpack[NormKeys],
    ) -> None:
        inputs, height, width = image_shape(input_shape, "a VGG net")
        normalize = Norm(**norm)
        modules: OrderedDict[str, nn.Module] = OrderedDict()
        for index, widths in enumerate(_STAGES):
            layers: list[nn.Module] = []
            for outputs in widths:
                layers += conv_norm_relu(inputs, outputs, 3, normalize)
                inputs = outputs
            if min(height, width) > 1:
                layers.append(nn.MaxPool2d(2))
                height, width = height // 2, width // 2
            modules[f"stage{index + 1}"] = nn.Sequential(*layers)
        if classifier == "small":
            modules.update(pool=GlobalAveragePool(), dropout=nn.Dropout(dropout), head=Linear(inputs, classes))
        else:
            modules["pool"] = nn.Sequential(nn.AdaptiveAvgPool2d(7), nn.Flatten())
            modules["hidden1"] = nn.Sequential(Linear(inputs * 49, 4096), nn.ReLU(), nn.Dropout(dropout))
            modules["hidden2"] = nn.Sequential(Linear(4096, 4096), nn.ReLU(), nn.Dropout(dropout))
            modules["head"] = Linear(4096, classes)
        super().__init__(modules)
        check_instance_norm(self, input_shape, norm["norm"])
