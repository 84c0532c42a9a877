"""Flags of other tools as they are typed, and the overrides that do the same here.

The table was written before the code that answers these flags, and is not fitted to it. `...` stands for a value that
only the user knows.
"""

from __future__ import annotations

FLAGS: dict[str, dict[str, str]] = {
    "Lightning": {  # fields of the Trainer and LightningCLI
        "--trainer.max_epochs=10": "rounds=10",  # a round is an epoch
        "--trainer.devices=4": "launch.nproc_per_node=4",
        "--trainer.num_nodes=2": "launch.nodes=2",
        "--trainer.precision=bf16-mixed": "precision=bf16",
        "--trainer.accumulate_grad_batches=4": "micro_batch_size=...",  # counts examples, not batches
        "--trainer.gradient_clip_val=0.5": "clip.max_norm=0.5",
        "--trainer.check_val_every_n_epoch=5": "eval.every_rounds=5",
        "--trainer.fast_dev_run=true": "run.smoke=true",
        "--seed_everything=7": "seed=7",
        "--optimizer=AdamW": "optimizer=adamw",
    },
    "TrainingArguments": {
        "--learning_rate 5e-5": "optimizer.lr=5e-5",
        "--num_train_epochs 3": "rounds=3",
        "--per_device_train_batch_size 8": "batch_size=...",  # counts the examples of all devices
        "--gradient_accumulation_steps 4": "micro_batch_size=...",
        "--max_grad_norm 1.0": "clip.max_norm=1.0",
        "--warmup_steps 500": "schedule=linear schedule.warmup_fraction=...",  # linear is the default there
        "--lr_scheduler_type cosine": "schedule=cosine",
        "--output_dir out": "run_dir=out",
        "--bf16 True": "precision=bf16",
        "--optim adamw_torch": "optimizer=adamw",
    },
    "Flower": {  # keys of its run configuration, and arguments of its strategies, partitioners and simulation
        "num-server-rounds=3": "rounds=3",
        "fraction_fit=0.5": "client_sampling=sample client_sampling.clients_per_round=...",  # counts clients
        "local-epochs=5": "round.epochs=5",
        "learning-rate=0.1": "optimizer.lr=0.1",
        "--num-supernodes 10": "clients=10",
        "num_clients=10": "clients=10",
        "min_fit_clients=2": "client_sampling=sample client_sampling.clients_per_round=2",
        "proximal_mu=0.1": "algorithm=fedprox algorithm.proximal_mu=0.1",
        "server_learning_rate=0.5": "server.lr=0.5",
        "alpha=0.1": "partition=dirichlet partition.alpha=0.1",
    },
    "torchrun": {
        "--nproc-per-node 4": "launch.nproc_per_node=4",
        "--nnodes=1:4": "launch.nodes=[1,4]",
        "--node-rank 0": "launch.rdzv_endpoint=HOST:29500",  # numbers the nodes itself
        "--rdzv-endpoint node0:29500": "launch.rdzv_endpoint=node0:29500",
        "--rdzv-backend c10d": "launch.rdzv_endpoint=HOST:29500",
        "--master-addr node0": "launch.rdzv_endpoint=node0:29500",
        "--master-port 29501": "launch.rdzv_endpoint=HOST:29501",
        "--max-restarts 3": "launch.max_restarts=3",
        "--standalone": "launch.nodes=1",
        "--log-dir logs": "run_dir=logs",
    },
    "Accelerate": {
        "--num_processes 8": "launch.nproc_per_node=8",
        "--num_machines 2": "launch.nodes=2",
        "--main_process_ip node0": "launch.rdzv_endpoint=node0:29500",
        "--main_process_port 29501": "launch.rdzv_endpoint=HOST:29501",
        "--mixed_precision bf16": "precision=bf16",
        "--cpu": "launch.device=cpu",
        "--multi_gpu": "launch.nproc_per_node=auto",  # one worker a visible GPU
        "--num_cpu_threads_per_process 4": "launch.threads_per_worker=4",
        "--dynamo_backend inductor": "compile_backend=inductor",
        "--gradient_clipping 1.0": "clip.max_norm=1.0",
    },
}
