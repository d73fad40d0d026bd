"""The networks of the zoo in Keras: the same layers, names and numbers as in `slimline.zoo.torch`."""

from slimline.zoo import architectures
from slimline.zoo.keras.build import build as build
from slimline.zoo.keras.build import builds
from slimline.zoo.keras.residual import residual_cnn as residual_cnn
from slimline.zoo.keras.weights import load_torch_weights as load_torch_weights

efficientnet_lite = builds(architectures.efficientnet_lite)
ghostnet = builds(architectures.ghostnet)
mobilenet_v1 = builds(architectures.mobilenet_v1)
mobilenet_v2 = builds(architectures.mobilenet_v2)
mobilenet_v3_large = builds(architectures.mobilenet_v3_large)
mobilenet_v3_small = builds(architectures.mobilenet_v3_small)
shufflenet_v1 = builds(architectures.shufflenet_v1)
shufflenet_v2 = builds(architectures.shufflenet_v2)
squeezenet = builds(architectures.squeezenet)
tinybert = builds(architectures.tinybert)
vit = builds(architectures.vit)
