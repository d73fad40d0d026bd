"""Light architectures, each written once for all frameworks."""

from slimline.zoo.architectures.efficientnet import efficientnet_lite as efficientnet_lite
from slimline.zoo.architectures.ghostnet import ghostnet as ghostnet
from slimline.zoo.architectures.mobilenet import mobilenet_v1 as mobilenet_v1
from slimline.zoo.architectures.mobilenet import mobilenet_v2 as mobilenet_v2
from slimline.zoo.architectures.mobilenet import mobilenet_v3_large as mobilenet_v3_large
from slimline.zoo.architectures.mobilenet import mobilenet_v3_small as mobilenet_v3_small
from slimline.zoo.architectures.shufflenet import shufflenet_v1 as shufflenet_v1
from slimline.zoo.architectures.shufflenet import shufflenet_v2 as shufflenet_v2
from slimline.zoo.architectures.squeezenet import squeezenet as squeezenet
from slimline.zoo.architectures.transformer import tinybert as tinybert
from slimline.zoo.architectures.transformer import vit as vit
