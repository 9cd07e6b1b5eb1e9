"""Many processes as one: ranks, sharding (FSDP2), checkpoints that any number of processes can read. Knows no stage.

In order: ranks and tensors in parts, sharding, checkpoints.
Papers: ZeRO (Rajbhandari et al. 2020), FSDP (Zhao et al. 2023), recomputation (Chen et al. 2016).
One process runs the same lines: its part of every tensor is all of it. No tensor parallelism: the models of this code
fit without, and it would put communication into every layer of model.py.
"""
import errno
import hashlib
import json
import os
import shutil
import sys
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from safetensors import safe_open
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import model as M


# ---- Ranks

def ranks():
    """This process's number and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def join(device):
    """Meet the other processes if torchrun started some; each takes the GPU of its number."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("gloo" if device == "cpu" else "cpu:gloo,cuda:nccl")
        if device != "cpu":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def leave_ranks():
    if dist.is_initialized():
        dist.destroy_process_group()


def share(value):
    """What every rank passes here, in their order. A small thing: it goes through the host. All wait for the last."""
    values = [value] * ranks()[1]
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def local(x):
    """The part of a tensor that lies here."""
    return x.detach().to_local() if isinstance(x, DTensor) else x.detach()


def rows(x):
    """Where that part lies: a slice of the first dimension."""
    if not isinstance(x, DTensor):
        return slice(None)
    (rank, world), n = ranks(), len(x)
    each = -(-n // world)
    return slice(min(rank * each, n), min(rank * each + each, n))


def whole(tensors):
    """Yield tensors, each put together from all ranks when its turn comes; every rank has to take them all."""
    for x in tensors:
        yield x.detach().full_tensor() if isinstance(x, DTensor) else x


def fill(named, path):
    """Read stored tensors into those of the same names: of each, only the rows that lie here."""
    with safe_open(path, "pt") as f:
        for name, x in named.items():
            local(x).copy_(f.get_slice(name)[rows(x)] if x.ndim else f.get_tensor(name))


# ---- Sharding

PRODUCTS = [getattr(torch.ops.aten, name).default for name in (
    "mm", "addmm", "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention")]


def shard(model, device, bf16=False, recompute="", compile=False):
    """Make a model ready to train, from outside and in place: each block (of any list called `blocks`) recomputes in the
    backward pass all of itself ("block") or all but its matrix products ("select"), is compiled, is shared out.

    bf16: blocks are gathered in bfloat16, what autocast would make of them; parts that do not learn carry no gradients.
    """
    mesh = init_device_mesh(device, (ranks()[1],)) if ranks()[1] > 1 else None
    contexts = {"context_fn": partial(create_selective_checkpoint_contexts, PRODUCTS)} if recompute == "select" else {}
    policy = MixedPrecisionPolicy(torch.bfloat16 if bf16 else None, torch.float32, cast_forward_inputs=False)
    stacks = [m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and name.endswith("blocks")]
    for block in (block for stack in reversed(stacks) for block in stack):
        if recompute:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, **contexts)
        if compile:
            block.compile()
        if mesh:
            fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh) if mesh else model


# ---- Checkpoints

FULL = errno.ENOSPC, errno.EDQUOT, errno.EFBIG          # a disk, a quota, the largest allowed file


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else \
            hashlib.sha256(f.read()).hexdigest()


def moments(learned, opt):
    """{name: tensor} of what the optimizer remembers of each parameter that has had a gradient."""
    return {f"{key}.{name}": x for name, p in learned.items() for key, x in opt.state.get(p, {}).items()}


def save_checkpoint(out, step, learned, opt, settings, keep):
    """Write out/step_N, whole or not at all: what learned, optimizer, hashes. Then drop the oldest complete ones.

    Tensors are put together and written one by one. Raises FloatingPointError rather than save what is not finite.
    """
    bad = share(next((name for name, p in learned.items() if not torch.isfinite(local(p)).all()), ""))
    if any(bad):
        raise FloatingPointError(f"step {step}: {max(bad)} is not finite; the last checkpoint is untouched")
    files = {"model.safetensors": learned, "optim.safetensors": moments(learned, opt)}
    values = whole(x for named in files.values() for x in named.values())
    if ranks()[0]:
        return sum(1 for _ in values)                           # hand over the parts that lie here
    with M.new_folder(Path(out) / f"step_{step:06}") as folder:
        for name, named in files.items():
            M.write_tensors(folder / name, named, islice(values, len(named)))
        state = {"step": step, "settings": settings, "bytes": {p.name: p.stat().st_size for p in folder.iterdir()},
                 "sha256": {p.name: sha256(p) for p in sorted(folder.iterdir())}}
        state["self"] = hashlib.sha256(json.dumps(state).encode()).hexdigest()
        (folder / "state.json").write_text(json.dumps(state, allow_nan=False))
    last = f"step_{step:06}"
    for old in sorted(p for p in Path(out).glob("step_??????") if p.name <= last and valid(p, contents=False))[:-keep]:
        try:
            shutil.rmtree(old)
        except OSError as error:
            print(f"could not delete {old}: {error.strerror}", file=sys.stderr)


def valid(folder, contents=True):
    """The state of a complete, undamaged checkpoint, else None. contents=False looks at sizes only."""
    try:
        state = json.loads((Path(folder) / "state.json").read_text())
        whole = state.pop("self") == hashlib.sha256(json.dumps(state).encode()).hexdigest()
        whole = whole and all((Path(folder) / name).stat().st_size == n for name, n in state.get("bytes", {}).items())
        whole = whole and (not contents or all(sha256(Path(folder) / name) == was for name, was in state["sha256"].items()))
        return state if whole else None
    except (OSError, ValueError, KeyError, AttributeError):
        return None


def find_checkpoint(out, resume):
    """The folder to resume from, or None. auto: the newest valid one in `out`; says which damaged ones it passes over."""
    if resume not in ("auto", "none"):
        if not valid(resume):
            raise SystemExit(f"train: {resume} is not a complete checkpoint")
        return Path(resume)
    for folder in sorted(Path(out).glob("step_??????"), reverse=True) if resume == "auto" else ():
        if valid(folder):
            return folder
        print(f"passing over {folder}: damaged", file=sys.stderr)


def restore(folder, learned, opt):
    """Put a checkpoint back, exactly, each rank its part; returns the number of steps done.

    Raises ValueError if other tensors learned then.
    """
    folder = Path(folder)
    with safe_open(folder / "model.safetensors", "pt") as model, safe_open(folder / "optim.safetensors", "pt") as optim:
        names, saved = set(model.keys()), set(optim.keys())
    if odd := sorted(names ^ learned.keys()):
        raise ValueError(f"{folder}: holds other tensors than this stage learns, such as {odd[0]}")
    for name, p in learned.items():
        if f"step.{name}" in saved:
            opt.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    fill(learned, folder / "model.safetensors")
    fill(moments(learned, opt), folder / "optim.safetensors")
    return json.loads((folder / "state.json").read_text())["step"]
