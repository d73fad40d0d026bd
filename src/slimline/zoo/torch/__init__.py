"""The networks of the zoo in PyTorch: `ResidualCNN` for small images, and light architectures from 224 × 224 on."""

from slimline.zoo import architectures
from slimline.zoo.torch.build import Network as Network
from slimline.zoo.torch.build import builds
from slimline.zoo.torch.residual import BasicBlock as BasicBlock
from slimline.zoo.torch.residual import ResidualCNN as ResidualCNN

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
