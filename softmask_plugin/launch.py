"""Train or evaluate from a YAML file, in the order of LAVIS's train.py and evaluate.py."""

from __future__ import annotations

import gc
import io
import logging
import os
import secrets
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lavis.common.config import Config
from lavis.common.dist_utils import is_main_process, setup_for_distributed
from lavis.common.logger import setup_logger
from lavis.common.registry import registry
from lavis.tasks import setup_task
from omegaconf import DictConfig, OmegaConf
from timm.utils import random_seed
from torch.distributed.rendezvous import rendezvous

from softmask_plugin.config.check import find_config, option, read_config
from softmask_plugin.config.run_options import setting
from softmask_plugin.config.values import check_datasets
from softmask_plugin.datasets.task_datasets import number_images
from softmask_plugin.errors import OF_ANY_PROCESS, UserError, reason_of
from softmask_plugin.files.checkpoint import WEIGHTS, furthest_first, open_checkpoint
from softmask_plugin.models.aligned import AlignedBase
from softmask_plugin.models.rerank import check_ranking
from softmask_plugin.runners.run_folder import AUTO, claim, release

Results = dict[str, Mapping[str, Any]]

# What evaluating a checkpoint changes in its run's configuration; a file must not trust itself
TRAINED = [
    "model.load_pretrained=true",
    "model.load_finetuned=false",
    "model.finetuned=null",
    "model.trust_checkpoint=false",
    "run.world_size=1",  # with the training's, one process within a Slurm job would seek others
]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in a run; ``checkpoint`` is the furthest that it has saved, if any."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.checkpoint = next(iter(furthest_first(folder)), None)


def run(
    cfg_path: str | Path, options: Sequence[str] = (), evaluate: bool = False
) -> tuple[Any, Results | None]:
    """Run one YAML file: train, then test; or only test.

    It may be called again in the same process, and on every rank that torchrun starts (nccl on
    CUDA, gloo on CPU).

    Args:
        cfg_path: A YAML file, or the name of a shipped one ("lavis_configs/projects/..."); to
            evaluate, also a checkpoint or a run's folder.
        options: Overrides, each "section.key=value".
        evaluate: Only test, as with ``run.evaluate=true``, with the weights that the model section
            names.

    Returns:
        The runner (its ``output_dir`` holds logs and checkpoints), and the metrics of each test
        split; None if the runner reports none, and on ranks other than 0.

    Raises:
        UserError: Something in the YAML file or the options is wrong.
    """
    cfg = load_config(cfg_path, options, evaluate)
    with prepared(cfg) as runner:
        cfg.pretty_print()
        if setting(cfg.run_cfg, "evaluate"):
            return runner, runner.evaluate(skip_reload=True)
        return runner, runner.train()


@contextmanager
def prepared(cfg: Config) -> Iterator[Any]:
    """Build a run's data sets, model and runner, in a folder that is its own until the block ends.

    Raises:
        UserError: Something in the configuration is wrong.
        Interrupted: Ctrl-C, also within the block.
    """
    # Data-loader workers are forked after tokenizers has run threads, which it would warn about
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    init_distributed(cfg.run_cfg)
    seed = int(cfg.run_cfg.seed)
    make_repeatable(bool(setting(cfg.run_cfg, "deterministic")))
    random_seed(seed)
    setup_logger()
    if not is_main_process():  # LAVIS lets each process print all warnings
        for handler in logging.getLogger().handlers:
            handler.addFilter(
                lambda record: (
                    record.levelno > logging.WARNING or record.name == OF_ANY_PROCESS.name
                )
            )

    task = setup_task(cfg)
    paths = registry.mapping["paths"]
    resume, evaluate = (setting(cfg.run_cfg, key) for key in ("resume_ckpt_path", "evaluate"))
    name = f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"  # LAVIS's may be another run's
    folder = claim(Path(cfg.run_cfg.output_dir), name, resume == AUTO and not evaluate)
    try:
        # LAVIS registers the run's folder only after building the data sets, which log to it
        paths |= {"output_dir": str(folder), "result_dir": str(folder / "result")}
        datasets = task.build_datasets(cfg)
        number_images(splits["train"] for splits in datasets.values() if "train" in splits)
        model = task.build_model(cfg)
        check_datasets(model, datasets)
        if evaluate and (heads := getattr(model, "new_heads", [])):
            raise UserError(
                f"the checkpoint has no {' and no '.join(heads)} that fits, so the scores would be "
                f"random: name one that was trained as {cfg.model_cfg.arch}, and set what changes "
                "its shape, such as model.num_classes, as it was"
            )
        if isinstance(model, AlignedBase):
            check_ranking(model, cfg.run_cfg)
        # Every rank has built the same model; from here on each draws its own data and dropout
        random_seed(seed, cfg.run_cfg.get("rank", 0))

        # LAVIS's runner registers both paths itself, and fails if they are registered already
        del paths["output_dir"], paths["result_dir"]
        runner_class = registry.get_runner_class(setting(cfg.run_cfg, "runner"))
        yield runner_class(cfg=cfg, job_id=folder.name, task=task, model=model, datasets=datasets)
    except KeyboardInterrupt as stop:
        raise Interrupted(folder) from stop
    finally:
        release(folder)


def load_config(
    cfg_path: str | Path, options: Sequence[str] = (), evaluate: bool = False
) -> Config:
    """Parse and check a YAML file with its overrides; add the defaults of model and data sets.

    To evaluate, a checkpoint or the folder of a run may stand for its configuration and weights.
    Overrides are merged before LAVIS sees the file: its own merge comes too late for
    ``datasets.*.type`` to choose its defaults.
    """
    if evaluate:
        options = [*options, "run.evaluate=true"]
    path, content = Path(cfg_path).expanduser(), None
    if evaluate and (path.is_dir() or path.suffix in WEIGHTS):
        content = open_checkpoint(cfg_path).config
        if not (content or {}).get("run", {}).get("task"):  # softmask export leaves it out
            raise UserError(
                f"{path} does not say how it was trained: name a YAML file with --cfg-path, and "
                f"add {option('model.pretrained', cfg_path)} to --options"
            )
        options = [option("model.pretrained", cfg_path), *TRAINED, *options]
    else:
        path = find_config(cfg_path)
    config = read_config(path, options, content)
    if evaluate and not config.run.get("test_splits"):
        raise UserError(f"run.test_splits is empty (in {path}): there is nothing to evaluate")
    config.run.setdefault("evaluate", False)
    # LAVIS would put a relative folder inside its own installation
    config.run.output_dir = str(Path(config.run.output_dir).expanduser().absolute())
    return Config(Namespace(cfg_path=io.StringIO(OmegaConf.to_yaml(config)), options=None))


def init_distributed(run_cfg: DictConfig) -> None:
    """Join the process group that torchrun or Slurm announces, if any; note it in ``run_cfg``.

    LAVIS's own function supports only nccl, so it cannot distribute a run on CPUs.

    Raises:
        UserError: The environment does not say which process this is, or where they meet.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        rank, size, local = "RANK", int(os.environ["WORLD_SIZE"]), "LOCAL_RANK"
    elif "SLURM_PROCID" in os.environ and setting(run_cfg, "world_size") > 1:
        rank, size, local = "SLURM_PROCID", int(run_cfg.world_size), "SLURM_LOCALID"
    else:
        run_cfg.distributed = False
        return
    if local not in os.environ:
        raise UserError(f"{rank} is set, but {local} is not: start with torchrun, or set both")
    cuda = run_cfg.device == "cuda"
    run_cfg.rank, run_cfg.world_size = int(os.environ[rank]), size
    run_cfg.gpu = int(os.environ[local])
    run_cfg.distributed = True
    run_cfg.dist_backend = "nccl" if cuda else "gloo"
    if cuda:
        if run_cfg.gpu >= (count := torch.cuda.device_count()):
            raise UserError(
                f"{local} is {run_cfg.gpu}, but this process sees {count} CUDA devices: start one "
                "process for each device, and let each see all devices of its machine"
            )
        torch.cuda.set_device(run_cfg.gpu)
    if not dist.is_initialized():
        join_group(run_cfg)
        setup_for_distributed(run_cfg.rank == 0)


def join_group(run_cfg: DictConfig) -> None:
    """Join the process group of a ``run:`` section, at ``run.dist_url``.

    After a restart, torchrun may hand over a store that still holds the addresses of the dead
    processes; half of the restarts then hung (gloo, torch 2.13). So each attempt uses names of its
    own.
    """
    timeout = timedelta(seconds=setting(run_cfg, "dist_timeout"))
    url, rank, size = setting(run_cfg, "dist_url"), run_cfg.rank, run_cfg.world_size
    try:
        store, _, _ = next(rendezvous(url, rank, size, timeout=timeout))
        store.set_timeout(timeout)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        names = dist.PrefixStore(f"softmask attempt {attempt}", store)  # type: ignore[attr-defined]
        dist.init_process_group(
            run_cfg.dist_backend, store=names, rank=rank, world_size=size, timeout=timeout
        )
    except (ValueError, dist.DistError) as error:
        raise UserError(
            f"process {rank} of {size} cannot meet the others (run.dist_url {url}): check their "
            f"common address and port, and that all of them start: {reason_of(error)[:200]}"
        ) from error


def leave_distributed() -> None:
    """Leave the process group, if there is one; call it after dropping the runner.

    A runner awaiting garbage collection still holds the group, and gloo's threads, which end with
    the group, abort the process if they free a tensor while the interpreter exits (torch 2.13).
    """
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


def make_repeatable(deterministic: bool) -> None:
    """Ask cuDNN for repeatable kernels; if ``deterministic`` (``run.deterministic``), use no others
    at all, which is slower on CUDA: an operation without one ends the run."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS wants it
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
