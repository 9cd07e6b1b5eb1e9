"""Many processes as one: ranks, sharding (FSDP2), checkpoints that any number of processes can read. Knows no stage.

In order: ranks and tensors in parts, sharding, memory of a step, checkpoints.
Papers: ZeRO (Rajbhandari et al. 2020), FSDP (Zhao et al. 2023), recomputation (Chen et al. 2016).
One process runs the same lines: its part of every tensor is all of it.
"""
import errno
import hashlib
import json
import os
import shutil
import sys
from collections import deque
from functools import partial
from itertools import chain, islice
from pathlib import Path

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import model as M


# ---- Ranks

def ranks():
    """This process's number and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def join(device):
    """Meet the other processes if torchrun started some; each takes the GPU of its number."""
    M.find_device(device)               # one that is not there is an error now
    if int(os.environ.get("WORLD_SIZE", 1)) <= 1:
        return
    # torchrun keeps one store through all its restarts, with the addresses of the dead in it. So rank 0 gives every
    # group a name of its own, to look up addresses under, and takes it back once all have met.
    store, rank, world = next(dist.rendezvous("env://"))
    if rank == 0:
        store.set("name", os.urandom(8).hex())
    own = dist.PrefixStore(store.get("name").decode(), store)               # get waits for rank 0
    dist.init_process_group("gloo" if device == "cpu" else "cpu:gloo,cuda:nccl", rank=rank, world_size=world, store=own)
    if rank == 0:
        store.delete_key("name")
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
    """Where that part lies: a slice of the first dimension, or all of it."""
    if not isinstance(x, DTensor):
        return ...
    rank, world = ranks()
    each = -(-len(x) // world)          # rounded up, as FSDP cuts: the last ranks may get fewer, or none
    return slice(rank * each, rank * each + each)


def whole(tensors):
    """Yield tensors, each put together from all ranks when its turn comes; every rank has to take them all."""
    return (x.detach().full_tensor() if isinstance(x, DTensor) else x for x in tensors)


def fill(named, stored, where):
    """Read stored tensors, mapped from files `where`, into those of the same names: of each, only the rows that lie here."""
    for name, x in named.items():
        if x.shape != stored[name].shape:
            raise ValueError(f"{where}: {name} has shape {list(stored[name].shape)}, the model's is {list(x.shape)}")
        local(x).copy_(stored[name][rows(x)])


# ---- Sharding

PRODUCTS = [getattr(torch.ops.aten, name).default for name in (     # what costs most to compute again
    "mm", "addmm", "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention")]
RECOMPUTE = {"block": {}, "select": {"context_fn": partial(create_selective_checkpoint_contexts, PRODUCTS)}}


def blocks_of(model):
    """The members of all lists called `blocks`, of inner lists first."""
    stacks = [stack for name, stack in model.named_modules() if name.endswith("blocks")]
    return [*chain(*reversed(stacks))]


def shard(model, device, bf16=False, recompute="", compile=False):
    """Make a model ready to train, from outside and in place: each block recomputes in the backward pass all of itself
    ("block") or all but its matrix products ("select"), is compiled, is shared out."""
    for block in blocks_of(model):
        if recompute:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, **RECOMPUTE[recompute])
        if compile:
            block.compile()
    if ranks()[1] == 1:
        return model
    mesh = init_device_mesh(device, (ranks()[1],))
    narrow = torch.bfloat16 if bf16 and device != "cpu" else None       # as autocast; layer norms of a CPU want float32
    policy = MixedPrecisionPolicy(narrow, torch.float32, cast_forward_inputs=False)
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh)


def gather_once(model):
    """Gather every part and let go of it."""
    # torch cannot accumulate gradients beside parts never gathered, as of a writer that this stage does not ask
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.unshard()
            part.reshard()


# ---- Memory of a step

def kept_bytes(run, skip=()):
    """Bytes that autograd keeps of what run() computes for the backward pass, but for storages of tensors in `skip`."""
    skipped, kept = {x.untyped_storage()._cdata for x in skip}, {}
    def note(x):
        kept[x.untyped_storage()._cdata] = x                    # held, so that no other takes its place
        return x
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        run()
    return sum(x.untyped_storage().nbytes() for key, x in kept.items() if key not in skipped)


def block_bytes(cfg, tokens, bf16, learned):
    """Bytes that a block of the language model keeps of `tokens` tokens for the backward pass; nothing is computed."""
    n = 4096                            # of fewer the attention of a CPU keeps more than that of a GPU
    with FakeTensorMode():
        block = M.LLMBlock(cfg, 0)
        for name, p in block.named_parameters():
            p.data = p.data.to(torch.bfloat16 if bf16 else torch.float32)
            p.requires_grad_(name in learned)
        x, rope = torch.zeros(1, n, cfg.dim, requires_grad=True), M.rope_table(cfg, n, "cpu")
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return kept_bytes(lambda: block(x, rope, None), [*block.parameters(), *rope]) * tokens // n


def gathered_bytes(model, bf16):
    """Bytes of the root's tensors and gradients, which stay whole through the pass, and of the two largest blocks."""
    blocks = [[*block.parameters()] for block in blocks_of(model)]
    root = sum(p.numel() * (p.itemsize + 4 * p.requires_grad) for p in set(model.parameters()).difference(*blocks))
    block = max(sum(p.numel() * (2 if bf16 else p.itemsize) * (1 + p.requires_grad) for p in block) for block in blocks)
    return root + 2 * block             # one computes, one is on its way


def plan(model, world, tokens, bf16=True, recompute="", cuts=1):
    """Bytes of a step on each of `world` processes; what learns outside the language model keeps more, so do kernels.
    model: on meta, with types and requires_grad of training; tokens: places in a micro-batch, of `cuts` an update."""
    def numbers(params, parts):         # in the largest parts: the first dimension is cut
        return sum(-(-p.shape[:1].numel() // parts) * p.shape[1:].numel() for p in params)
    cfg, learned = model.cfg.llm, [p for p in model.parameters() if p.requires_grad]
    names = {name for name, p in model.llm.blocks[0].named_parameters() if p.requires_grad}
    one, enters = block_bytes(cfg, tokens, bf16, names), 4 * tokens * cfg.dim                 # of a block, into a block
    kept = cfg.n_layer * enters + one if recompute == "block" else cfg.n_layer * one
    cast = sum(2 * p.numel() for p in learned if p.ndim > 1) * bf16                           # autocast's copies
    return {"weights": sum(numbers([p], world) * p.itemsize for p in model.parameters()),
            "gradients": 4 * numbers(learned, world if cuts < 2 else 1),                      # whole until the last cut
            "moments": 8 * numbers(learned, world),                                           # AdamW's two, float32
            "gathered": gathered_bytes(model, bf16) if world > 1 else cast,
            "activations": kept + tokens * cfg.vocab_size * (10 if bf16 else 12)}             # with the logits


# ---- Checkpoints

FULL = errno.ENOSPC, errno.EDQUOT, errno.EFBIG          # a disk, a quota, the largest allowed file


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


FILES = "model.safetensors", "optim.safetensors"
MEASURES = {"bytes": os.path.getsize, "sha256": sha256}         # by which damage to a file shows


def measured(folder, kinds=MEASURES):
    """{kind of measure: {file: value}} of a checkpoint."""
    return {kind: {name: MEASURES[kind](folder / name) for name in FILES} for kind in kinds}


def moments(learned, opt):
    """{name: tensor} of what the optimizer remembers of each parameter that has had a gradient."""
    return {f"{key}.{name}": x for name, p in learned.items() for key, x in opt.state.get(p, {}).items()}


def step_of(folder):
    return int(folder.name.removeprefix("step_"))


def checkpoints(out):
    """Folders of checkpoints, by their steps."""
    return sorted((p for p in Path(out).glob("step_*") if p.name.removeprefix("step_").isdecimal()), key=step_of)


def save_checkpoint(out, step, learned, opt, settings, keep):
    """Write out/step_N, whole or not at all, then drop the oldest complete ones. FloatingPointError for bad weights."""
    bad = share(next((name for name, p in learned.items() if not torch.isfinite(local(p)).all()), ""))
    if any(bad):
        raise FloatingPointError(f"step {step}: {max(bad)} is not finite; the last checkpoint is untouched")
    remembered = moments(learned, opt)
    values = whole(chain(learned.values(), remembered.values()))            # one by one: all would not fit
    if ranks()[0]:
        return deque(values, maxlen=0)                          # hand over the parts that lie here
    with M.new_folder(Path(out) / f"step_{step:06}") as folder:
        M.write_tensors(folder / "model.safetensors", learned, islice(values, len(learned)))
        M.write_tensors(folder / "optim.safetensors", remembered, values)
        state = {"step": step, "settings": settings} | measured(folder)
        state["self"] = hashlib.sha256(json.dumps(state).encode()).hexdigest()
        (folder / "state.json").write_text(json.dumps(state, allow_nan=False))
    drop_old([p for p in checkpoints(out) if step_of(p) <= step], keep)


def drop_old(folders, keep):
    """Delete all but the newest complete checkpoints. Damaged ones neither count nor go."""
    complete = [p for p in folders if valid(p, ["bytes"])]
    for old in complete[:-keep]:
        try:
            shutil.rmtree(old)
        except OSError as error:
            print(f"could not delete {old}: {error.strerror}", file=sys.stderr)


def valid(folder, kinds=MEASURES):
    """Whether a checkpoint is complete and these measures of it show no damage."""
    try:
        state = json.loads((folder / "state.json").read_text())
        intact = state.pop("self") == hashlib.sha256(json.dumps(state).encode()).hexdigest()
        return intact and state == state | measured(folder, kinds)
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


def find_checkpoint(out, resume):
    """The folder to resume from, or None. auto: the newest valid one in `out`; names damaged ones it passes over."""
    if resume not in ("auto", "none"):
        if not valid(Path(resume)):
            raise SystemExit(f"train: {resume} is not a complete checkpoint")
        return Path(resume)
    for folder in reversed(checkpoints(out)) if resume == "auto" else ():
        if valid(folder):
            return folder
        print(f"passing over {folder}: damaged", file=sys.stderr)


def restore(folder, learned, opt):
    """Put a checkpoint back, exactly, each rank its part -> steps done. ValueError if other tensors learned then."""
    model, optim = M.mapped(folder / "model.safetensors"), M.mapped(folder / "optim.safetensors")
    if odd := sorted(model.keys() ^ learned.keys()):
        raise ValueError(f"{folder}: holds other tensors than this stage learns, such as {odd[0]}")
    for name, p in learned.items():
        if f"step.{name}" in optim:     # AdamW knows nothing of those that never had a gradient
            opt.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p),
                            "exp_avg_sq": torch.zeros_like(p)}
    fill(learned, model, folder)
    fill(moments(learned, opt), optim, folder)
    return json.loads((folder / "state.json").read_text())["step"]
