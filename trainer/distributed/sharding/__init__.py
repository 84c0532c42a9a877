"""How the ranks of a silo hold and train a model together: each all of it, or in parts."""

from trainer.distributed.sharding.parallel_model import ParallelModel as ParallelModel
from trainer.distributed.sharding.parallelize import can_pass_alone as can_pass_alone
from trainer.distributed.sharding.parallelize import initial_device as initial_device
from trainer.distributed.sharding.parallelize import is_without_values as is_without_values
from trainer.distributed.sharding.parallelize import parallelize as parallelize
from trainer.distributed.sharding.parallelize import validate_initial as validate_initial
from trainer.distributed.sharding.parallelize import validate_plan as validate_plan
from trainer.distributed.sharding.parallelize import whole_tensor as whole_tensor
