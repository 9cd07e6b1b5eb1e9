"""Public checkpoints to weights folders and back.

In order: command line, tables (theirs, ours), the engine that applies them, files and what they hold, sources,
configuration, the plan and its report, writing and the start.
Weight files are strangers' work: nothing in them is executed, every size is checked before it is believed. Tensors are
read, changed and written one at a time, so memory does not grow with the model.
"""
import argparse
import json
import math
import os
import pickle
import re
import shutil
import signal
import struct
import sys
import zipfile
import zlib
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import lru_cache, partial
from itertools import chain, starmap
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

# ---- Command line

EXAMPLES = """\
examples:
  one language model, one encoder
    convert_weights.py vicuna-7b-v1.5/ --out weights/vicuna
    convert_weights.py clip-vit-large-patch14-336/ --out weights/clip
  ChatBind from its published delta, or with the delta applied, or a language model with a projector trained for it
    convert_weights.py vicuna-7b/ chatbind-delta/ imagebind_huge.pth --out weights/chatbind-7b
    convert_weights.py chatbind-7b/ imagebind_huge.pth --out weights/chatbind-7b
    convert_weights.py vicuna-7b/ mm_projector.bin imagebind_huge.pth --out weights/chatbind-7b
  NExT-Chat, ChatterBox, NExT-GPT, and the diffusion models that this one prompts, each a folder of its own
    convert_weights.py nextchat-7b-336/ --out weights/nextchat-7b
    convert_weights.py mp_rank_00_model_states.pt clip-vit-large-patch14/ --out weights/chatterbox-13b
    convert_weights.py vicuna-7b-v0/ nextgpt_7b_tiva_v0/ imagebind_huge.pth --out weights/nextgpt-7b
    convert_weights.py stable-diffusion-v1-5/ --out weights/nextgpt-7b/painters/sd15
  a model to train, from parts of others; what training makes is initialised and listed
    convert_weights.py --preset nextchat-7b-336 vicuna-7b/ clip-large-336/ sam_vit_h.pth --out weights/start
    convert_weights.py --preset chatterbox-13b llava-llama-2-13b/ clip-large/ groundingdino.pth --out weights/start
    convert_weights.py --preset omni-7b nextchat/ imagebind_huge.pth chatterbox.pt nextgpt/ --out weights/omni
  look first: which key goes where, what is missing
    convert_weights.py chatbind-7b/ imagebind_huge.pth --dry-run --verbose
  back to the public names, for other programs
    convert_weights.py --export weights/chatbind-7b --out chatbind-hf

A source is a folder or a file: .safetensors, .bin, .pth, .pt, .ckpt, whole or in shards, also a snapshot folder of the
Hugging Face cache. What it is follows from its keys, never from its name. Nothing is downloaded, no source is changed.
tokenizer.model is copied from beside a source; ChatterBox's file comes without one: put LLaMA-2's there.
Exit status: 0 done, 2 something is missing or does not fit, 3 a file is unsafe or damaged."""


def size(text):                                         # '5GB' or '5' -> 5e9, '500MB' -> 5e8
    text = text.upper()
    return float(text.removesuffix("MB").removesuffix("GB")) * (1e6 if text.endswith("MB") else 1e9)


def parse_args():
    parser = argparse.ArgumentParser(description="Public checkpoints to a weights folder, or back.", epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("sources", nargs="*", metavar="SOURCE", help="folders and files that together make one model")
    add("--out", type=Path, metavar="DIR", help="folder to write: all of it or, if anything goes wrong, nothing")
    add("--export", type=Path, metavar="WEIGHTS_DIR", help="write this weights folder under the public names instead")
    add("--preset", default="", metavar="NAME", help="build this model of what the sources have of it; what "
        "training makes may be missing")
    add("--merge-lora", action="store_true", help="fold LoRA into the weights (else it is kept beside them)")
    add("--dtype", choices=("keep", "fp32", "bf16", "fp16"), default="keep", help="of the weights (keep)")
    add("--quantize", choices=("int8", "int4"), help="keep the language model's matrices in 8 or 4 bits")
    add("--max-shard", type=size, default="5GB", metavar="SIZE", help="largest file to write (5GB)")
    add("--overwrite", action="store_true", help="replace DIR if it exists")
    add("--dry-run", action="store_true", help="stop after the report: write nothing")
    add("--verbose", action="store_true", help="list every key in the report, not the first 20")
    add("--report", type=Path, metavar="FILE", help="also write the report as JSON")
    args = parser.parse_intermixed_args()               # a source may come behind a flag
    if bool(args.sources) == bool(args.export):
        parser.error("name the sources to convert, or --export WEIGHTS_DIR")
    if args.export and (args.quantize or args.preset or args.merge_lora):
        parser.error("--quantize, --preset and --merge-lora are for weights folders, not for exports")
    if not args.out and not args.dry_run:
        parser.error("--out DIR is needed (or --dry-run)")
    return args


if __name__ == "__main__":
    ARGS = parse_args()                 # before the imports that take seconds, so that --help answers at once

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm

import generate as G
import model as M
from vision import HUGE, SAMConfig


class Refused(ValueError):
    """What is wrong with which file and what to do, in one line. `code`: exit status, 3 = unsafe or damaged, else 2."""

    def __init__(self, message, code=2):
        super().__init__(message)
        self.code = code


@contextmanager
def refusing(what, advice="", code=2):                  # parsers of damaged files and odd sizes raise anything
    try:
        yield
    except Refused:
        raise
    except Exception as error:
        raise Refused(f"{what} ({error!r:.200}){advice}", code) from None


# ---- Tables
# A row is (theirs, ours). {} is an index, {a,b} one of the words (on both sides, matched by place), * the rest;
# ours None = dropped on purpose, with the reason. Read from right to left the same rows export.

def under(theirs, ours, table):                         # the rows of a table, each name behind a prefix
    return [(theirs + row[0], row[1] and ours + row[1], *row[2:]) for row in table]


LLAMA = under("", "llm.", [
    ("{model.embed_tokens,model.norm,lm_head}.*",       "{embed,norm,lm_head}.*"),
    ("model.layers.{}.self_attn.{q,k,v,o}_proj.weight", "blocks.{}.attn.w{q,k,v,o}.weight"),
    ("model.layers.{}.self_attn.rotary_emb.inv_freq",   None, "recomputed from the configuration"),
    ("model.layers.{}.mlp.{gate,up,down}_proj.*",       "blocks.{}.mlp.{gate,up,down}.*"),
    ("model.layers.{}.{input,post_attention}_layernorm.*", "blocks.{}.{attn,mlp}_norm.*"),
])
LORA = [("model.layers.{}.self_attn.{q,k,v,o}_proj.lora_{A,B}.default.weight",              # PEFT's name: default
         "llm.blocks.{}.attn.w{q,k,v,o}.lora_{A,B}")]
CLIP_BLOCKS = [                                         # the same in its tower for pictures and in that for text
    ("encoder.layers.{}.self_attn.{q,k,v,out}_proj.*",  "blocks.{}.attn.w{q,k,v,o}.*"),
    ("encoder.layers.{}.{layer_norm1,layer_norm2,mlp}.*", "blocks.{}.{attn_norm,mlp_norm,mlp}.*"),
]
CLIP_VISION = under("vision_model.", "readers.clip.tower.", CLIP_BLOCKS + [
    ("embeddings.class_embedding",                      "cls"),
    ("embeddings.{patch,position}_embedding.*",         "{patch,pos}.*"),
    ("embeddings.position_ids",                         None, "they count 0, 1, 2, ..."),
    ("{pre_layrnorm,post_layernorm}.*",                 "{pre_norm,norm}.*"),               # layrnorm: sic
])
CLIP = CLIP_VISION + [
    ("text_model.*",                                    None, "text tower, no chat model reads it"),
    ("{visual_projection.weight,text_projection.weight,logit_scale}",
     None, "only compares pictures with the text tower"),
]
TOWER = "readers.imagebind.tower.towers."
ANY, GRID = "{vision,text,audio,depth,thermal,imu}.", "{vision,audio,depth,thermal}."  # GRID: what is cut in patches
IMAGEBIND = under("modality_", TOWER, [
    ("preprocessors." + ANY + "cls_token",              ANY + "cls"),
    ("preprocessors.{vision.rgbt_stem.proj.1,text.token_embedding}.weight", "{vision,text}.stem.weight"),
    ("preprocessors.{audio.rgbt,thermal.rgbt,depth.depth,imu.imu}_stem.{proj,norm_layer}.*",
     "{audio,thermal,depth,imu}.{stem,stem_norm}.*"),
    ("preprocessors.text.mask",                         None, "causal mask, rebuilt"),
    ("preprocessors." + GRID + "pos_embedding_helper.pos_embed", GRID + "pos"),
    ("preprocessors.{text,imu}.pos_embed",              "{text,imu}.pos"),
    ("trunks." + ANY + "pre_transformer_layer.0.*",     ANY + "pre_norm.*"),
    ("trunks." + ANY + "blocks.{}.{norm_1,norm_2,mlp}.*", ANY + "blocks.{}.{attn_norm,mlp_norm,mlp}.*"),
    ("trunks." + ANY + "blocks.{}.attn.out_proj.*",     ANY + "blocks.{}.attn.wo.*"),
    ("trunks." + ANY + "blocks.{}.attn.in_proj_{weight,bias}", ANY + "blocks.{}.attn.wqkv.{weight,bias}"),
    ("trunks." + ANY + "blocks.{}.attn.bias_{k,v}",     ANY + "blocks.{}.attn.bias_{k,v}"),
    ("heads." + GRID + "{0,2}.*",                       GRID + "{norm,head}.*"),            # 1 takes the class token
    ("heads.{imu.0,imu.3,text.proj.0,text.proj.1}.*",   "{imu.norm,imu.head,text.norm,text.head}.*"),
    ("postprocessors." + ANY + "1.log_logit_scale",     ANY + "log_scale"),
])
CHATBIND = LLAMA + [("model.mm_projector.*",            "readers.imagebind.projector.*")]
LLAVA = LLAMA + [("model.mm_projector.*",               "readers.clip.projector.*")]
SAM = under("", "writers.at.sam.", [("{image_encoder,prompt_encoder,mask_decoder}.*",) * 2])
NEXTCHAT = LLAVA + under("model.vision_tower.", "", CLIP_VISION) + [
    ("loc_encoder.*",                                   "readers.box.*"),
    ("{loc_decoder,seg_prompt_mlp}.*",                  "writers.at.{loc_decoder,seg_prompt_mlp}.*"),
    ("sam.model.*",                                     "writers.at.sam.*"),
]
LOCATOR = "writers.vg.locator."
GROUNDING_DINO = under("", LOCATOR, under("backbone.0.", "swin.", [
    ("patch_embed.{proj,norm}.*",                       "{patch,patch_norm}.*"),
    ("layers.{}.blocks.{}.{norm1,norm2,mlp}.*",         "stages.{}.{}.{attn_norm,mlp_norm,mlp}.*"),
    ("layers.{}.blocks.{}.attn.{qkv,proj}.*",           "stages.{}.{}.attn.{wqkv,wo}.*"),
    ("layers.{}.blocks.{}.attn.relative_position_bias_table", "stages.{}.{}.attn.bias_table"),
    ("layers.{}.blocks.{}.attn.relative_position_index", None, "recomputed from the window's size"),
    ("layers.{}.downsample.*",                          "merges.{}.*"),
    ("norm{0,1,2,3}.*",                                 "norms.{0,1,2,3}.*"),
]) + under("transformer.encoder.fusion_layers.{}.", "encoder.{}.fusion.", [                 # v: vision, l: language
    ("layer_norm_{v,l}.*",                              "{image,text}_norm.*"),
    ("gamma_{v,l}",                                     "{image,text}_gamma"),
    ("attn.{v,l,values_v,values_l,out_v,out_l}_proj.*", "{image_qk,text_qk,image_v,text_v,image_out,text_out}.*"),
]) + under("transformer.encoder.text_layers.{}.", "encoder.{}.text.", [
    ("self_attn.in_proj_{weight,bias}",                 "attn.wqkv.{weight,bias}"),
    ("{self_attn.out_proj,norm1,norm2,linear1,linear2}.*", "{attn.wo,attn_norm,mlp_norm,mlp.fc1,mlp.fc2}.*"),
]) + under("transformer.encoder.layers.{}.", "encoder.{}.image.", [
    ("self_attn.{sampling_offsets,attention_weights,value_proj,output_proj}.*", "attn.{offsets,weights,wv,wo}.*"),
    ("{norm1,norm2,linear1,linear2}.*",                 "{attn_norm,mlp_norm,mlp.fc1,mlp.fc2}.*"),
]) + under("transformer.decoder.layers.{}.", "decoder.{}.", [
    ("{self_attn,ca_text}.in_proj_{weight,bias}",       "{self_attn,text_attn}.wqkv.{weight,bias}"),
    ("{self_attn,ca_text}.out_proj.*",                  "{self_attn,text_attn}.wo.*"),
    ("cross_attn.{sampling_offsets,attention_weights,value_proj,output_proj}.*", "attn.{offsets,weights,wv,wo}.*"),
    ("{norm1,norm2,norm3,catext_norm,linear1,linear2}.*", "{attn_norm,self_norm,mlp_norm,text_norm,mlp.fc1,mlp.fc2}.*"),
]) + [
    ("transformer.decoder.ref_point_head.layers.{0,1}.*", "query_pos.{0,2}.*"),             # Linear, ReLU, Linear
    ("transformer.{decoder.bbox_embed.0,enc_out_bbox_embed}.layers.{0,1,2}.*", "{box,proposal_box}.{0,2,4}.*"),
    ("transformer.decoder.bbox_embed.{1,2,3,4,5}.*",    None, "all layers share the first one's"),
    ("transformer.{decoder.norm,tgt_embed,enc_output,enc_output_norm}.*", "{norm,queries,proposal,proposal_norm}.*"),
    ("transformer.level_embed",                         "level_embed"),
    ("input_proj.{}.{0,1}.*",                           "input_proj.{}.{conv,norm}.*"),
    ("bbox_embed.*",                                    None, "all layers share that of the decoder"),
    ("{bert,feat_map}.*",                               None, "text encoder; the language model writes the query"),
    ("label_enc.*",                                     None, "only for training with noised labels"),
])
CHATTERBOX = under("lm.base_model.model.", "", LLAVA + LORA) + under("visual_grounding_model.", "", GROUNDING_DINO) + [
    ("spi_module.mlvl_fuse.input_conv.{}.*",            "readers.region.inputs.{}.*"),
    ("spi_module.mlvl_fuse.fuse_convs.{}.{conv,gn}.*",  "readers.region.fuse.{}.{conv,norm}.*"),
    ("spi_module.roi_align.pconvs.{}.*",                "readers.region.pool_convs.{}.*"),
    ("spi_module.roi_align.pos_embedd.{0,2,3,5}.*",     "readers.region.box_embed.{fc1,norm1,fc2,norm2}.*"),
    ("spi_module.roi_align.{flatten_linear,updims}.*",  "readers.region.{flatten,out}.*"),
    ("text_hidden_fcs.0.{0,2}.*",                       "writers.vg.query.{0,2}.*"),
    ("{tgt_align,refpoint_align}.*",                    None, "the original never uses them"),
]

# A diffusion decoder is a folder of its own; theirs is the subfolder, then the key, as in unet.conv_in.weight. Where
# old and new releases have different names, ours repeats itself; the last of theirs is the one to go back to.
CODER, PIXELS = "vae.{encoder,decoder}.", "vae.{encoder,decoder}.mid_block.attentions.0."
UNCHANGED = ["unet.*", "vae.{quant_conv,post_quant_conv}.*", CODER + "mid_block.resnets.*", PIXELS + "group_norm.*",
             CODER + "{conv_in,conv_norm_out,conv_out,down_blocks,up_blocks}.*",
             "vocoder.{conv_pre,upsampler,resblocks,conv_post}.*"]
PAINTER = [(name, name) for name in UNCHANGED] + [
    (PIXELS + "{query,key,value,proj_attn,to_q,to_k,to_v,to_out.0}.*",
     PIXELS + "{to_q,to_k,to_v,to_out.0,to_q,to_k,to_v,to_out.0}.*"),
    ("vocoder.{mean,scale}",                            None, "statistics of speech, not used"),
    ("text_encoder.text_projection.linear{1,2}.*",      "text.fc{1,2}.*"),
] + under("text_encoder.{,text_model.}", "text.{,}", CLIP_BLOCKS + [                        # transformers 5: no prefix
    ("embeddings.{position,token_type}_ids",            None, "they count 0, 1, 2, ...; they are 0"),
    ("{embeddings.token_embedding,embeddings.position_embedding,final_layer_norm}.*", "{embed,pos,norm}.*"),
]) + under("text_encoder.text_model.", "text.", [       # of CLAP: a RoBERTa, which norms behind each layer
    ("embeddings.{word,position,token_type}_embeddings.*", "{embed,pos,kind}.*"),
    ("embeddings.LayerNorm.*",                          "embed_norm.*"),
    ("encoder.layer.{}.attention.self.{query,key,value}.*", "blocks.{}.attn.w{q,k,v}.*"),
    ("encoder.layer.{}.attention.output.{dense,LayerNorm}.*", "blocks.{}.{attn.wo,attn_norm}.*"),
    ("encoder.layer.{}.{intermediate.dense,output.dense,output.LayerNorm}.*", "blocks.{}.{mlp.fc1,mlp.fc2,mlp_norm}.*"),
    ("pooler.dense.*",                                  "pool.*"),
])
STACK, ATTN = "{encoder,decoder}.", "{self,multihead}_attn."
OUTPUT_PROJECTION = under("gen_text_hidden_fcs{,_video,_audio}.0.", "writers.{img,vid,aud}.proj.", [
    ("query_embs",                                      "query_embs"),
    ("{fc,model}.*",                                    "{fc,model}.*"),
    ("tfm.{encoder,decoder}.norm.*",                    "{encoder,decoder}_norm.*"),
    ("tfm." + STACK + "layers.{}." + ATTN + "in_proj_{weight,bias}", STACK + "{}.{attn,cross}.wqkv.{weight,bias}"),
    ("tfm." + STACK + "layers.{}." + ATTN + "out_proj.*", STACK + "{}.{attn,cross}.wo.*"),
    ("tfm." + STACK + "layers.{}.linear{1,2}.*",        STACK + "{}.mlp.fc{1,2}.*"),
    ("tfm.encoder.layers.{}.norm{1,2}.*",               "encoder.{}.{attn,mlp}_norm.*"),
    ("tfm.decoder.layers.{}.norm{1,2,3}.*",             "decoder.{}.{attn,cross,mlp}_norm.*"),
])
# The prefix says whether the model has LoRA; {,} in our name makes nothing of either.
NEXTGPT = under("llama_model.{base_model.model.,}", "{,}", LLAMA) + under("llama_model.base_model.model.", "", LORA) + [
    ("input_embeddings.weight",                         None, "the embedding once more"),
    ("llama_proj.*",                                    "readers.imagebind.projector.*"),
] + OUTPUT_PROJECTION
TABLE = CHATBIND + CLIP + IMAGEBIND + SAM               # their names never meet, so one table reads most
TABLES = {"llava": LLAVA, "nextchat": NEXTCHAT, "chatterbox": CHATTERBOX, "groundingdino": GROUNDING_DINO,
          "nextgpt": NEXTGPT, "painter": PAINTER}       # the rest
# Names in config.json {theirs: ours}, read both ways as well
SIZES = {"hidden_size": "dim", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
         "intermediate_size": "mlp_dim"}
LLM_FIELDS = SIZES | {"num_key_value_heads": "n_kv_head", "rms_norm_eps": "norm_eps", "rope_theta": "rope_theta",
                      "max_position_embeddings": "max_len", "tie_word_embeddings": "tied", "head_dim": "head_dim",
                      "vocab_size": "vocab_size"}
ROPE_FIELDS = {"factor": "rope_factor", "low_freq_factor": "rope_low", "high_freq_factor": "rope_high",
               "original_max_position_embeddings": "rope_train_len"}                        # of Llama 3
PUBLIC = {                              # of a system: model_type, architecture and {theirs: ours} of config.json
    "plain": ("llama", "LlamaForCausalLM", {}),
    "chatbind": ("llava_image_bind_select_all", "LlavaLlamaImageBindSelectForCausalLM",
                 {"mm_hidden_size": "imagebind.out_dim"}),
    "nextchat": ("nextchat", "NextChatForSegLM", {"mm_hidden_size": "clip.dim", "mm_depth": "projector_depth",
                                                  "mm_vision_select_layer": "clip.feature_layer"})}
TOLD = "norm_eps", "max_len", "rope_theta", *ROPE_FIELDS.values()             # what no shape tells
CLIP_FIELDS = SIZES | {"image_size": "image_size", "patch_size": "patch_size"}
TEXT_FIELDS = SIZES | {"vocab_size": "vocab_size", "max_position_embeddings": "max_len", "hidden_act": "act",
                       "layer_norm_eps": "norm_eps"}
CONV_FIELDS = {"in_channels": "channels", "block_out_channels": "widths", "layers_per_block": "n_resnet",
               "norm_num_groups": "groups"}
UNET_FIELDS = CONV_FIELDS | {"projection_class_embeddings_input_dim": "class_dim"}          # of AudioLDM's condition
VAE_FIELDS = CONV_FIELDS | {"latent_channels": "latent", "scaling_factor": "scale"}
VOCODER_FIELDS = {"model_in_dim": "mel_bins", "sampling_rate": "rate", "upsample_initial_channel": "width",
                  "upsample_rates": "up_rates", "upsample_kernel_sizes": "up_kernels",
                  "resblock_kernel_sizes": "kernels"}


# ---- Engine

HOLES = re.compile(r"\{([^}]*)\}|\*")
AS_REGEX = str.maketrans({".": r"\.", "*": "(.+)", "{": "(", ",": "|", "}": ")"})


@lru_cache(maxsize=None)
def compiled(pattern):                                  # (regular expression, [the words of each hole])
    regex = pattern.replace("{}", r"{\d+}").translate(AS_REGEX)         # {a,b} -> (a|b), {} -> (\d+), * -> (.+)
    return re.compile(regex), [words.split(",") for words in HOLES.findall(pattern)]


def rewrite(key, pattern, target):
    """The name `target` gives to `key` if `pattern` matches it in full, else None. Words map by place (last wins)."""
    regex, words = compiled(pattern)
    match = regex.fullmatch(key)
    if not match:
        return None
    names = (dict(zip(*both)).get(found, found) for found, *both in zip(match.groups(), words, compiled(target)[1]))
    return HOLES.sub(lambda hole: next(names), target)


def matching(key, table):                               # the rows for a key: one, or table and key do not fit
    return [row for row in table if compiled(row[0])[0].fullmatch(key)]


def translate(key, table):
    """Our name of their key, or None if it is dropped. Raises KeyError unless exactly one row matches."""
    rows = matching(key, table)
    if len(rows) != 1:
        raise KeyError(f"{key} is matched by {len(rows)} rows" + "".join(f"; {row[0]}" for row in rows))
    theirs, ours, *_ = rows[0]
    return ours and rewrite(key, theirs, ours)


def original(name, tables=(TABLE, *TABLES.values())):   # their name of one of our tensors, None if it has none
    keys = (rewrite(name, ours, theirs) for theirs, ours, *_ in chain(*tables) if ours)
    return next(filter(None, keys), None)


def rename(state, table):
    """A whole state dict under our names. Raises KeyError if a key has no row or two."""
    return {name: value for key, value in state.items() if (name := translate(key, table))}


# ---- Files

WRAPPERS = "state_dict", "model", "module"              # Lightning; GroundingDINO; DeepSpeed
INDICES = "model.safetensors.index.json", "pytorch_model.bin.index.json"
LAYOUTS = (*INDICES, "model.safetensors", "diffusion_pytorch_model.safetensors", "model*.safetensors", "*.safetensors",
           "pytorch_model.bin", "diffusion_pytorch_model.bin", "pytorch_model*.bin", "*.bin", "*.pth",
           "mp_rank_00_model_states.pt", "*.pt", "*.ckpt")          # of DeepSpeed, beside states of its optimizer
PAINTER_PARTS = "unet", "vae", "text_encoder", "vocoder"        # folders of a diffusion model


class Stored(NamedTuple):
    """A tensor in a file, unread. `like` (on meta) has its shape, strides and type; its bytes begin at `start`."""
    path: Path
    key: str
    like: torch.Tensor
    start: int | None = None            # None: `like` is no likeness but the tensor

    @property
    def span(self):                                     # bytes from the first to the last number, gaps included
        return self.like.untyped_storage().nbytes()

    def read(self):                                     # by plain reads: mapped pages would count as memory in use
        if self.start is None:
            return self.like.clone()                    # rows are written into what is read, and storages may be shared
        data = torch.empty(self.span, dtype=torch.uint8)
        with open(self.path, "rb") as f:
            f.seek(self.start)
            if f.readinto(data.numpy()) < len(data):
                raise Refused(f"{self.path}: ends too early; download it again", 3)
        return data.view(self.like.dtype).as_strided(self.like.shape, self.like.stride())


def beside(path, name):                                 # a file of the folder that a source is, or lies in
    return (path if path.is_dir() else path.parent) / name


def read_json(path):                                    # the object in a JSON file, {} if there is no such file
    if not path.is_file():
        return {}
    with refusing(f"{path}: not a JSON object", "; download it again", 3):
        return {**json.loads(path.read_bytes())}


def open_safetensors(path):
    return [Stored(path, key, torch.empty(shape, dtype=dtype, device="meta"), start)
            for key, (dtype, shape, start) in M.stored_in(path).items()]


def zip_records(path):
    """{byte where the data of an uncompressed record begins: its size}. torch computes these places without looking."""
    records, end = {}, os.path.getsize(path)
    with zipfile.ZipFile(path) as z, open(path, "rb") as f:
        for info in z.infolist():
            f.seek(info.header_offset + 26)             # of the record's own header of 30 bytes: two lengths end it
            start = info.header_offset + 30 + sum(struct.unpack("<HH", f.read(4)))      # behind name and extra field
            if info.compress_type == zipfile.ZIP_STORED and start + info.file_size <= end:
                records[start] = info.file_size
    return records


class Ignored:                                          # stands for an object of DeepSpeed's settings
    def __init__(self, *args):
        pass
    __setstate__ = __init__                             # takes whatever the file says of it, too


def unpickle(path, zipped):
    """What lies in a file of torch's, of which only plain data is ever unpickled. Of a zip no tensor is read."""
    load = partial(torch.load, path, map_location="cpu", weights_only=True)
    try:
        if not zipped:
            return load()
        # DeepSpeed's mp_rank_00_model_states.pt also describes its training, which is skipped without being built
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        settings = [(Ignored, name) for name in names if re.fullmatch(r"deepspeed\..*|argparse\.Namespace", name)]
        with torch.serialization.safe_globals(settings), FakeTensorMode():              # fake: shapes and places only
            return load()
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|class|function) ([\w.]+)", str(error))
        raise Refused(f"{path}: unsafe or damaged, not loaded: it holds more than plain tensors"
                      f"{f' ({found[1]})' if found else ''}; use a .safetensors version", 3) from None


def stored_in_zip(path, tensors):
    """[Stored] of a zip of torch's. tensors: {key: without numbers, but it knows where torch thinks that these lie}."""
    records, out = zip_records(path), []
    for key, x in tensors.items():
        like = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        record = x.untyped_storage()._checkpoint_offset
        out.append(Stored(path, key, like, record + x.storage_offset() * x.itemsize))
        if record + records.get(record, -1) < out[-1].start + out[-1].span:
            raise ValueError(f"{key} does not lie in a plain record of the zip")
    return out


def open_pickle(path):                                  # a .bin, .pth, .pt or .ckpt file
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        raise Refused(f"{path}: reading such files safely needs torch 2.10 or newer; update torch or use .safetensors")
    with open(path, "rb") as f:
        zipped = f.read(2) == b"PK"
    state = unpickle(path, zipped)
    for _ in WRAPPERS:                                  # one may lie in another
        state = next((state[key] for key in WRAPPERS if isinstance(state.get(key), dict)), state)
    tensors = {key: x.detach() for key, x in state.items() if isinstance(x, torch.Tensor)}
    if zipped:
        return stored_in_zip(path, tensors)
    return [Stored(path, key, x) for key, x in tensors.items()]         # of torch's old format, which is read whole


def open_file(path):                                    # the Stored tensors of a file, by its header; raises Refused
    with open(path, "rb") as f:
        head = f.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise Refused(f"{path}: a Git-LFS pointer, not the file itself; fetch that with git lfs pull", 3)
    if head.lstrip().startswith(b"<"):
        raise Refused(f"{path}: a web page, not weights; the download needs a login or another address", 3)
    with refusing(f"{path}: truncated or damaged", "; download it again", 3):   # JSON begins behind 8 bytes of length
        found = open_safetensors(path) if path.suffix == ".safetensors" or head[8:9] == b"{" else open_pickle(path)
        for x in found:                                 # nbytes > span: an expanded view, of few bytes but any size
            if not isinstance(x.key, str) or x.like.dtype not in M.CODES or x.like.nbytes > x.span:
                raise ValueError(f"{x.key!r:.60} is no plain tensor")
        if not found:
            raise ValueError("it holds no tensors")
    return found


def indexed(index):                                     # the files that an index names, which must lie beside it
    with refusing(f"{index}: names no shards", "; download it again", 3):
        names = set(map(str, read_json(index)["weight_map"].values())) or {"?"}
    if absent := names - {path.name for path in index.parent.iterdir() if path.is_file()}:      # as "../x": leads out
        raise Refused(f"{index}: shard {min(absent)!r} is not a file of this folder; download both again", 3)
    return [index.parent / name for name in sorted(names)]


def files_of(path):
    """The files of a source: itself, the shards an index names, or what a folder has of the first of LAYOUTS."""
    if path.is_file():
        return [path]
    for layout in LAYOUTS:
        if files := sorted(path.glob(layout)):
            return indexed(*files) if layout in INDICES else files
    advice = "name one of its folders snapshots/*" if (path / "snapshots").is_dir() else "download it first"
    raise Refused(f"{path}: {'holds no weights' if path.is_dir() else 'no such file or folder'}; {advice}")


def open_files(path):                                   # {key: Stored} of a source; of a painter {folder.key: Stored}
    if (path / "model_index.json").is_file():
        parts = [part for part in PAINTER_PARTS if (path / part).is_dir()]
        return {f"{part}.{key}": x for part in parts for key, x in open_files(path / part).items()}
    out = {}
    for x in chain.from_iterable(map(open_file, files_of(path))):
        if x.key in out:
            raise Refused(f"{x.key} stands in {out[x.key].path} and again in {x.path}; remove one of them")
        out[x.key] = x
    return out


# ---- Sources

SIGNS = {"imagebind": "modality_", "chatterbox": r"^lm\.base_model\.", "nextchat": r"^loc_encoder\.",
         "groundingdino": r"\.fusion_layers\.", "sam": r"^mask_decoder\.", "painter": r"^unet\.",
         "nextgpt": r"^(llama_model|llama_proj|gen_text_hidden_fcs\w*)\.", "clip": r"vision_model\.|pre_layrnorm\.",
         "llama": r"model\.layers\.", "projector": r"mm_projector\."}       # of several that fit, the first
SPELLINGS = {"projector": (r"^.*?(?=(mm_projector|embed_tokens)\.)", "model."),         # written with or without prefix
             "clip": (r"^(?=(embeddings|encoder|pre_layrnorm|post_layernorm)\.)", "vision_model.")}     # transformers 5
LLMS = "llama", "llava", "chatbind", "nextchat", "chatterbox"           # kinds with a whole language model
BASES = {"sam": "--preset nextchat-7b-336 vicuna-7b/ clip-large-336/",                  # what it takes to use one
         "groundingdino": "--preset chatterbox-13b llava-llama-2-13b/ clip-large/",
         **dict.fromkeys(("delta", "projector", "nextgpt"), "vicuna-7b/ imagebind_huge.pth")}
BRIDGED = "delta", "projector", "nextgpt", *LLMS[1:]    # kinds that bring a projector
TOKENS = list(M.CHATBIND_TOKENS)                        # padding first, then the three around media
PUBLISHED = {p.system: p.added_tokens for p in M.PRESETS.values() if p.system != "tiny"}
EMBED, NORM, HEAD = "llm.embed.weight", "llm.norm.weight", "llm.lm_head.weight"
BRIDGE = "readers.imagebind.projector.weight"
AUDIO_SCALE, CLS = TOWER + "audio.log_scale", "readers.clip.tower.cls"
MASK_TOKENS = "writers.at.sam.mask_decoder.mask_tokens.weight"


class Row(NamedTuple):
    """A line of the report. fate: renamed, merged, dropped, or in capitals what stops the conversion."""
    source: str
    kind: str
    fate: str
    key: str
    part: str = ""
    note: str = ""


class Source(NamedTuple):
    """One checkpoint under our names. kind: one of SIGNS, llava, chatbind or delta."""
    path: Path
    kind: str
    tensors: dict                       # our name: Stored
    rows: list                          # of the report, for keys that have no name of ours

    def json(self, name):                               # a JSON file of its folder
        return read_json(beside(self.path, name))

    def shape(self, name):
        if name not in self.tensors or not self.tensors[name].like.ndim:
            raise Refused(f"{self.path}: MISSING {name}, without which its sizes are unknown; download it again")
        return tuple(self.tensors[name].like.shape)

    def matches(self, pattern):
        return [match for name in self.tensors if (match := re.fullmatch(pattern, name))]

    def depth(self, stem):                              # number of blocks under a name, from the highest index
        return 1 + max((int(match[1]) for match in self.matches(re.escape(stem) + r"\.blocks\.(\d+)\..*")), default=-1)

    def size(self):                                     # of the language model
        return f"{self.depth('llm')} layers of width {self.shape(EMBED)[-1]}"

    def tokens(self, needed=()):
        """{added token: row of its embedding}, as its files say or as published. Raises Refused if they do not fit."""
        rows = self.shape(EMBED)[0] if EMBED in self.tensors else 0
        if self.kind == "projector":                    # of a file of 2 rows: those around media, without the patch's
            names = TOKENS[max(1, len(TOKENS) - rows):]
            return dict(zip(names, range(rows - len(names), rows)))
        tokens = self.json("added_tokens.json") or PUBLISHED.get(self.kind.replace("delta", "chatbind"), {})
        fit = all(type(i) is int and 0 <= i < rows for i in tokens.values())            # JSON's true is an int as well
        if not fit or not tokens.keys() >= set(needed):
            raise Refused(f"{self.path}: added_tokens.json is missing or does not fit {rows} embedding rows; "
                          "take the one of the same download")
        return tokens


# What config.json must say where it says it; of LLaVA's fields, ChatBind's original heeds one
SEEN = {"hidden_act": "silu", "mm_vision_select_layer": "-2", "mm_vision_select_feature": "patch"}
PLAIN, FRAMED = {"hidden_act": "silu", "model_type": "llama|llava.*"}, {"mm_use_im_start_end": "True"}
LLM_KNOWN = {"llama": PLAIN, "llava": SEEN, "nextchat": SEEN | FRAMED, "chatbind": PLAIN | FRAMED}


def kind_of(keys):
    lines = "\n".join(keys)
    return next((kind for kind, sign in SIGNS.items() if re.search(sign, lines, re.M)), None)


def group(paths):
    """(path, {key: Stored}) of each source. Files whose names differ by a number and that share no key are shards."""
    out = [(Path(), {})]
    for path in map(Path, paths):
        found, (last, others) = open_files(path), out[-1]
        alike = path.parent == last.parent and re.sub(r"\d", "", path.name) == re.sub(r"\d", "", last.name)
        if alike and path.is_file() and not found.keys() & others.keys():
            others |= found
        else:
            out.append((path, found))
    return out[1:]


def translate_all(found, kind, path):                   # -> {our name: Stored}, [(fate, key, note)] of other keys
    tensors, rest, unknown = {}, [], (None, None, "unknown to the tables")
    for key, stored in found.items():
        key = re.sub(*SPELLINGS.get(kind, ("^", "")), key.removeprefix("module."))      # module: of some GroundingDINO
        rows = matching(key, TABLES.get(kind, TABLE))
        theirs, ours, *why = rows[0] if len(rows) == 1 else unknown
        if ours is None:
            rest.append(("dropped" if theirs else "UNEXPECTED", stored.key, *why))
            continue
        name = rewrite(key, theirs, ours)
        if name in tensors:
            raise Refused(f"{path}: {stored.key} and {tensors[name].key} both become {name}; remove one of them")
        tensors[name] = stored
    return tensors, rest


def is_delta(tensors):                                  # its norms average 0, those of a whole model are near 1
    norms = [x.read().double().mean() for name, x in tensors.items() if re.match(r"llm\..*norm\.weight", name)]
    return abs(sum(norms)) < 0.05 * len(norms)


def open_source(path, found):                           # -> the Source of one checkpoint
    kind = kind_of(found)
    if kind is None:
        raise Refused(f"{path}: not a LLaMA, CLIP, SAM, GroundingDINO, ImageBind, ChatBind, NExT-Chat, ChatterBox, "
                      f"NExT-GPT or diffusion model (it holds {min(found)}); give one of those")
    c = read_json(beside(path, "config.json")) if kind in LLM_KNOWN else {}
    if kind == "llama" and re.fullmatch("llava(?!.*bind).*", str(c.get("model_type"))):
        kind = "llava"                                  # its projector is for CLIP; a ChatBind's has the same name
    tensors, rest = translate_all(found, kind, path)
    if kind == "llama" and BRIDGE in tensors:
        kind = "chatbind"
    require(LLM_KNOWN.get(kind, {}), c, path)
    if kind in ("llama", "chatbind", "llava") and is_delta(tensors):
        kind = "delta"
    return Source(path, kind, tensors, [Row(str(path), kind, fate, key, note=note) for fate, key, note in rest])


def check_parts(parts, preset):
    """Refuse additions without what they are added to, two projectors, and a painter in company."""
    useless = [parts[kind] for kind in BASES if kind in parts]
    if useless and "llm" not in parts:
        path, kind = useless[-1].path, useless[-1].kind
        raise Refused(f"{path} is a {kind}, useless alone; name its base model too, for instance: "
                      f"convert_weights.py {BASES[kind]} {path} --out DIR")
    bridges = [part.path for part in parts.values() if part.kind in BRIDGED]
    if len(bridges) > 1 and not preset:
        raise Refused(f"{bridges[0]} and {bridges[1]}: the projector would be given twice; leave one of them out")
    if "painter" in parts and (preset or len(parts) > 1):
        raise Refused(f"{parts['painter'].path}: a diffusion model makes a weights folder of its own; convert it alone")


def open_sources(paths, preset):
    """{role: Source}: its kind, or llm for the first whole language model. Of a preset others may bring parts."""
    parts, taken = {}, {}                               # taken: {role or kind: Source}
    for source in starmap(open_source, group(paths)):
        role = "llm" if source.kind in LLMS and not (preset and "llm" in parts) else source.kind
        if role in taken:
            what = "whole language models (norm weights of a delta average 0)" if role == "llm" else f"of kind {role}"
            raise Refused(f"{taken[role].path} and {source.path} are both {what}; leave one of them out")
        parts[role] = taken[role] = taken[source.kind] = source
    check_parts(parts, preset)
    return parts


# ---- Configuration

def require(known, given, where):                       # known: {name: pattern of the values that we can do}
    for key, pattern in known.items():
        if given.get(key) is not None and not re.fullmatch(pattern, str(given[key])):
            raise Refused(f"{where}: {key} {given[key]!r} is not supported; known: {pattern}")


def picked(values, table):                              # what a table names of their values, under our names
    return {ours: values[theirs] for theirs, ours in table.items() if values.get(theirs) is not None}


def word(token):                                        # of a tokenizer: itself, or an object with all that is known
    return token["content"] if isinstance(token, dict) else token


def llm_config(path, rows, c):
    """What their config.json says about the language model; left out values have the original LLaMA's defaults."""
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}      # the new name and the old one
    scaling = rope.get("rope_type") or rope.get("type") or "default"
    require({"rope_scaling": "default|llama3"}, {"rope_scaling": scaling}, path)
    defaults = {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "rope_theta": rope.get("rope_theta")}
    values = picked(defaults | c | {"vocab_size": rows}, LLM_FIELDS)
    if scaling == "llama3":
        values |= {ours: rope[theirs] for theirs, ours in ROPE_FIELDS.items()}          # all of them, or it is refused
    if values.get("head_dim") == values["dim"] // values["n_head"]:     # LLMConfig names it only if it is another
        del values["head_dim"]
    return M.to_config(M.LLMConfig, {"n_kv_head": values["n_head"]} | values, path)


def first_and_last(path, c):
    """Ids that begin prompts, as the tokenizer's files say, and end answers, by generation_config.json, config.json."""
    generation, tokenizer, special = (read_json(beside(path, f"{name}.json")) for name in
                                      ("generation_config", "tokenizer_config", "special_tokens_map"))
    ids = {"bos": 1, "eos": 2} | picked(c | generation, {"bos_token_id": "bos", "eos_token_id": "eos"})
    if ids == {"bos": 0, "eos": 1}:                     # early conversions of LLaMA: its tokenizer says 1 and 2
        ids = {"bos": 1, "eos": 2}
    bos = {"<s>": 1, "</s>": 2}.get(word((tokenizer | special).get("bos_token")), ids["bos"])           # 2: Vicuna v0
    eos = ids["eos"] if isinstance(ids["eos"], list) else [ids["eos"]]  # Llama 3 ends in several ways
    return {"bos": int(bos), "eos": tuple(map(int, eos))}


def closest_preset(source):
    """For want of a config.json: a preset of this depth and width, of the same kind and vocabulary if there is one."""
    size, kind = (source.depth("llm"), source.shape(EMBED)[-1]), "chatbind" if BRIDGE in source.tensors else source.kind
    fits = [p for p in M.PRESETS.values() if p.llm and (p.llm.n_layer, p.llm.dim) == size]
    if not fits:
        raise Refused(f"{source.path}: no config.json beside it, and no preset has {source.size()}; put one there")
    return min(fits, key=lambda p: (p.system != kind, p.llm.vocab_size != source.shape(EMBED)[0]))


def clip_config(source):
    """CLIPConfig, from shapes; heads cannot be seen in them, those of all published CLIPs are 64 wide."""
    stem, c = "readers.clip.tower", source.json("config.json") if source.kind == "clip" else {}
    c = c.get("vision_config") or c                     # of a whole CLIP
    require({"hidden_act": "quick_gelu"}, c, source.path)
    dim, _, _, patch = source.shape(stem + ".patch.weight")             # (C, 3, patch, patch)
    side = math.isqrt(source.shape(stem + ".pos.weight")[0] - 1)        # (1 + side * side, C), 1 for the class token
    values = dict(image_size=side * patch, patch_size=patch, dim=dim, n_head=c.get("num_attention_heads", dim // 64),
                  n_layer=source.depth(stem), mlp_dim=source.shape(stem + ".blocks.0.mlp.fc1.weight")[0])
    return M.to_config(M.CLIPConfig, values, source.path)


def sam_config(source):
    """SAMConfig, from shapes; the mask decoders of all published SAMs have 2 layers of 8 heads."""
    def size(name, axis=0):
        return source.shape("writers.at.sam." + name)[axis]
    n_layer, patch = source.depth("writers.at.sam.image_encoder"), size("image_encoder.patch_embed.proj.weight", 3)
    reach = [size(f"image_encoder.blocks.{i}.attn.rel_pos_h") for i in range(n_layer)]      # 2 * side - 1 of each
    dim = size("image_encoder.pos_embed", 3)            # (1, side, side, C)
    values = dict(
        image_size=patch * size("image_encoder.pos_embed", 1), patch_size=patch, dim=dim, n_layer=n_layer,
        n_head=dim // size("image_encoder.blocks.0.attn.rel_pos_h", 1),                     # (2 * side - 1, hd)
        mlp_dim=size("image_encoder.blocks.0.mlp.lin1.bias"), window=(min(reach) + 1) // 2,
        global_layers=[i for i, n in enumerate(reach) if n > min(reach)],                   # these see the whole image
        n_mask=source.shape(MASK_TOKENS)[0], prompt_dim=source.shape(MASK_TOKENS)[1],
        mask_dim=size("prompt_encoder.mask_downscaling.3.bias"),
        dec_mlp_dim=size("mask_decoder.transformer.layers.0.mlp.lin1.bias"),
        iou_dim=size("mask_decoder.iou_prediction_head.layers.0.bias"))
    return M.to_config(SAMConfig, values, source.path)


def imagebind_config(source, unit_sounds):
    """ImageBindConfig, from shapes; heads are as wide as in ImageBind-Huge. unit_sounds: do not scale those."""
    towers, out_dim = {}, 0
    for kind, huge in HUGE.items():
        if n_layer := source.depth(TOWER + kind):
            out_dim, dim = source.shape(f"{TOWER}{kind}.head.weight")
            towers[kind] = asdict(huge) | {"dim": dim, "n_layer": n_layer, "n_head": dim * huge.n_head // huge.dim}
    if "audio" in towers and unit_sounds:               # parity: NExT-GPT's sounds stay at unit length
        towers["audio"]["scale"] = False
    return M.to_config(M.ImageBindConfig, {"towers": towers, "out_dim": out_dim}, source.path)


# What the decoders' files must say where they say it: anything else would load and paint something else.
PAINTER_KNOWN = {
    "unet": {"act_fn": "silu", "flip_sin_to_cos": "True", "freq_shift": "0", "norm_eps": "1e-05",
             "downsample_padding": "1", "only_cross_attention": "False", "use_linear_projection": "False",
             "center_input_sample": "False", "mid_block_scale_factor": r"1(\.0)?", "dual_cross_attention": "False",
             "resnet_time_scale_shift": "default", "class_embed_type": "simple_projection",
             "time_embedding_type": "positional"},
    "vae": {"act_fn": "silu"}, "text_encoder": {"hidden_act": "quick_gelu|gelu", "projection_hidden_act": "relu"},
    "vocoder": {"leaky_relu_slope": "0.1", "normalize_before": "False"},
    "scheduler": {"_class_name": "PNDMScheduler|DDIMScheduler", "num_train_timesteps": "1000",
                  "beta_schedule": "scaled_linear", "skip_prk_steps": "True", "steps_offset": "1",
                  "set_alpha_to_one": "False", "clip_sample": "False", "prediction_type": "epsilon",
                  "timestep_spacing": "leading", "thresholding": "False", "trained_betas": "null",
                  "rescale_betas_zero_snr": "False"}}
PAINTER_FILES = {part: "config.json" for part in PAINTER_PARTS} | {
    "scheduler": "scheduler_config.json", "tokenizer": "special_tokens_map.json"}


def painter_files(source):                              # {subfolder: values} of its JSON files
    files = {part: source.json(f"{part}/{name}") for part, name in PAINTER_FILES.items()}
    for part in ("unet", "vae", "text_encoder", "scheduler"):
        if not files[part]:
            raise Refused(f"{source.path}: MISSING {part}/{PAINTER_FILES[part]}; download the whole folder again")
    files["tokenizer"] = source.json("tokenizer/tokenizer_config.json") | files["tokenizer"]    # which wins
    return files


def unet_config(c):                                     # what UNetConfig says in other words than unet/config.json
    video = c["down_block_types"][0].endswith("3D")
    heads, widths = c["attention_head_dim"], c["block_out_channels"]
    if video:                                           # parity: the width of a head; in the others, their number
        heads = [width // heads for width in widths]
    return {"video": video, "n_head": heads if isinstance(heads, list) else [heads] * len(widths),
            "attends": ["Attn" in kind for kind in c["down_block_types"]],
            "context_dim": 0 if c.get("class_embed_type") else c["cross_attention_dim"]}


def painter_config(files, where):                       # files: {subfolder: values} of a diffusion model's JSON
    files = {part: {k: v for k, v in values.items() if v is not None} for part, values in files.items()}
    for part, known in PAINTER_KNOWN.items():
        require(known, files.get(part, {}), f"{where}: {part}")

    def read(cls, part, table, **more):
        return M.to_config(cls, picked(files[part], table) | more, f"{where}: {part}")
    text, schedule, sounds = files["text_encoder"], files["scheduler"], bool(files.get("vocoder"))
    end, pad = text["vocab_size"] - 1, word(files.get("tokenizer", {}).get("pad_token"))
    ids = {"start": end - 1, "end": end, "pad": 0 if pad == "!" else end}       # "!": ZeroScope's
    if sounds:                                          # prompted by a RoBERTa
        ids = {"start": 0, "end": 2, "pad": 1, "out_dim": text["projection_dim"]}
    pndm = schedule.get("_class_name", "PNDMScheduler") == "PNDMScheduler"      # others may keep its fields
    return G.PainterConfig(
        read(G.UNetConfig, "unet", UNET_FIELDS, **unet_config(files["unet"])), read(G.VAEConfig, "vae", VAE_FIELDS),
        read(G.TextConfig, "text_encoder", TEXT_FIELDS, **ids),
        read(G.VocoderConfig, "vocoder", VOCODER_FIELDS) if sounds else None,
        scheduler="plms" if pndm and schedule.get("skip_prk_steps") else "ddim",
        beta_start=schedule["beta_start"], beta_end=schedule["beta_end"])


def place_tokens(source, rows, projector):
    """({added token: id}, embedding rows). A projector file alone appends the tokens it was trained with."""
    tokens = source.json("added_tokens.json")
    if not projector or tokens.keys() >= set(TOKENS[1:]):
        return source.tokens(TOKENS[1:]), rows
    trained = projector.shape(EMBED)[0] if EMBED in projector.tensors else 2
    new = rows + 3 if trained == 2 else trained         # 2: only those around media, beside a third that never learned
    if new - rows not in (0, 3, 4):
        raise Refused(f"{projector.path} was trained with {trained} embedding rows, {source.path} has {rows}; "
                      "give it the language model it was trained with")
    names = TOKENS[-max(3, new - rows):]                # 0: they are there already, in the last rows
    return tokens | dict(zip(names, range(new - len(names), new))), new


def nextchat_config(source, parts):
    """What a NExT-Chat adds to the configuration of its language model; its towers may lie in files of their own."""
    clip, sam = (next((part for part in parts.values() if name in part.tensors), None) for name in (CLS, MASK_TOKENS))
    clip, sam = clip_config(clip) if clip else closest_preset(source).clip, sam_config(sam) if sam else None
    media = {"image_size": clip.image_size, "sam_size": sam.image_size if sam else 0}
    return {"system": "nextchat", "reads": M.NEXTCHAT.reads, "writes": M.NEXTCHAT.writes, "clip": clip, "sam": sam,
            "projector_depth": len(source.matches(r"readers\.clip\.projector\.(\d+\.)?weight")),
            "media": M.NEXTCHAT.media | media, "added_tokens": source.tokens(M.NEXTCHAT_TOKENS)}


def nextgpt_config(source, llm):
    """What a NExT-GPT file adds to the configuration of its base. It does not tell alpha: the published one is used."""
    rank = next((x.like.shape[0] for name, x in source.tensors.items() if name.endswith("lora_A")), 0)      # (r, C)
    llm = replace(llm, vocab_size=source.shape(EMBED)[0], lora_rank=rank, lora_dropout=M.NEXTGPT.llm.lora_dropout)
    out = {"system": "nextgpt", "added_tokens": source.tokens(sum(M.SIGNALS.values(), ())), "writes": M.SIGNALS,
           "projections": {}, "llm": llm, "imagebind": M.ImageBindConfig({}, source.shape(BRIDGE)[-1]),
           "bos": 1}                                    # whatever its base says
    for name, run in M.SIGNALS.items():
        stem = f"writers.{name}.proj"
        _, n_query, dim = source.shape(f"{stem}.query_embs")            # (1, n_query, dim)
        n_layer = len(source.matches(rf"{stem}\.encoder\.\d+\.attn\.wo\.bias"))
        out["projections"][name] = M.ProjectionConfig(
            llm.dim, len(run), n_query, source.shape(f"{stem}.model.bias")[0], dim, n_layer=n_layer,
            mlp_dim=source.shape(f"{stem}.encoder.0.mlp.fc1.bias")[0])
    return out


def vocabulary_config(main, projector):                 # -> added tokens and, of ChatBind, its bridge; embedding rows
    rows = main.shape(EMBED)[0]
    if projector or BRIDGE in main.tensors:
        tokens, rows = place_tokens(main, rows, projector)
        bind = M.ImageBindConfig({}, (projector or main).shape(BRIDGE)[-1])             # no towers, only their width
        return {"system": "chatbind", "added_tokens": tokens, "imagebind": bind}, rows
    if main.kind == "llava":
        return {"added_tokens": main.tokens()}, rows
    return {"added_tokens": {token: i for token, i in main.json("added_tokens.json").items() if i < rows}}, rows


def language_config(main, parts):                       # what files of a language model, and of additions, tell
    out, rows = vocabulary_config(main, parts.get("projector"))
    if c := main.json("config.json") or parts["llm"].json("config.json"):
        llm = llm_config(main.path, rows, c)
    else:
        llm = replace(closest_preset(main).llm, vocab_size=rows, lora_rank=0)
    out |= {"llm": llm} | first_and_last(main.path, c)
    if "nextgpt" in parts:
        out |= nextgpt_config(parts["nextgpt"], llm)
    if main.kind == "nextchat":
        out |= nextchat_config(main, parts)
    return out


def configure(parts):                                   # -> the config; ChatterBox's files tell no sizes: a preset's
    out, main = {}, parts.get("delta", parts.get("llm"))
    if main and main.kind == "chatterbox":
        return closest_preset(main)
    if "clip" in parts:
        out = {"clip": clip_config(parts["clip"]), "reads": {"image": "clip"}}
    if main:
        out |= language_config(main, parts)
    if "imagebind" in parts:
        bind = imagebind_config(parts["imagebind"], unit_sounds="nextgpt" in parts)
        reads = {kind: "imagebind" for kind in M.IMAGEBIND_READS if M.TOWERS.get(kind, kind) in bind.towers}
        out |= {"imagebind": bind, "reads": reads | out.get("reads", {})}
    return M.ModelConfig(**out)


# ---- Plan and report

COPIES = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
          "bpe_simple_vocab_16e6.txt.gz", "merges.txt", "vocab.json")
WRITTEN = re.compile(r"(model(-\d+-of-\d+)?|imagebind)\.safetensors|" +                # all that conversions write
                     "|".join(map(re.escape, (*COPIES, "config.json", "added_tokens.json", INDICES[0]))))
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NOT_NEEDED = {HEAD: ("dropped", "tied to the embedding"),
              AUDIO_SCALE: ("dropped", "NExT-GPT's sounds stay at unit length")}
NO_MODEL = "config.json or shapes describe no model"
# What training makes, and which file gives the rest
LEARNED = re.compile(r"readers\.(\w+\.projector|box|region)\..*|.*\.lora_[AB]|"
                     r"writers\.(at\.(?!sam\.).*|vg\.query\..*|\w+\.proj\..*)")
GIVEN_BY = {"readers.imagebind.projector": "a ChatBind, mm_projector.bin or, untrained, --preset chatbind-7b",
            "readers.clip.tower": "clip-vit-large-patch14 or -336", "writers.at.sam": "sam_vit_h_4b8939.pth",
            "readers.imagebind.tower": "imagebind_huge.pth", "writers.vg.locator": "groundingdino_swinb_cogcoor.pth"}


class Target(NamedTuple):
    """A tensor to write, and what is done to it: see value."""
    stored: Stored
    shape: tuple
    dtype: torch.dtype
    base: Stored | None = None          # what a delta is added to, in its first rows
    tokens: tuple = ()                  # of the vocabulary: how many rows to keep, [(Stored, its rows, ours)] of tokens
    lora: tuple = ()                    # B, A, factor

    @property
    def nbytes(self):
        return math.prod(self.shape) * self.dtype.itemsize

    def cast(self, choice):                             # only floating point is ever converted
        return self._replace(dtype=FLOATS.get(choice, self.dtype)) if self.dtype.is_floating_point else self

    def value(self):
        x = self.stored.read()
        if self.base:                                   # parity: apply_delta adds in float16
            x = x.half().contiguous()
            x[:self.base.like.shape[0]] += self.base.read().half()
        if self.tokens:
            x = self.with_tokens(x, *self.tokens)
        if self.lora:
            b, a, factor = self.lora                    # (out, r), (r, in)
            x = x.float() + factor * b.read().float() @ a.read().float()
        return x.to(self.dtype).contiguous()

    def with_tokens(self, x, keep, rows):               # as in training: new rows begin as the mean of the old ones
        x = x[:keep]                                    # (V, C) -> (keep, C)
        mean = x.float().mean(0, keepdim=True).to(x.dtype)
        x = torch.cat([x, mean.expand(self.shape[0] - len(x), -1)])
        for other, theirs, ours in rows:
            x[ours] = other.read()[theirs].to(x.dtype)
        return x


class Made(NamedTuple):
    """In place of a Stored: a tensor that no source gives, initialised for training, each time in the same way."""
    model: torch.nn.Module              # on meta
    key: str
    like: torch.Tensor

    def read(self):
        path, _, leaf = self.key.rpartition(".")
        part, holder = self.model.get_submodule(part_of(self.key)), self.model.get_submodule(path)
        setattr(holder, leaf, torch.nn.Parameter(torch.empty(self.like.shape)))         # all others stay on meta
        torch.manual_seed(zlib.crc32(self.key.encode()))                                # Python's hash differs by run
        M.initialise(part)
        x = getattr(holder, leaf).detach()
        setattr(holder, leaf, torch.nn.Parameter(self.like))
        return x


class Plan(NamedTuple):
    """All that is needed to write a folder."""
    files: dict                         # stem of file names: {tensor name: Target}
    texts: dict                         # file name: what to write as JSON
    copies: list                        # files to copy
    report: list                        # of Row
    cfg: M.ModelConfig | None = None    # of a weights folder

    @property
    def nbytes(self):
        return sum(target.nbytes for targets in self.files.values() for target in targets.values())

    def layout(self, limit):                            # {file: its targets}, {file: what to write as JSON}
        files, texts = {}, dict(self.texts)
        for stem, targets in self.files.items():
            shards = split(targets, stem, limit if stem == "model" else math.inf)
            files |= shards
            if len(shards) > 1:
                texts[INDICES[0]] = {"metadata": {"total_size": sum(target.nbytes for target in targets.values())},
                                     "weight_map": {key: name for name, shard in shards.items() for key in shard}}
        return files, texts


def part_of(name):                                      # component of a tensor: llm, readers.clip.tower, ...
    return ".".join(name.split(".")[:3 if name.startswith(("readers.", "writers.")) else 1])


def tokenizer_files(folders):                           # and what else of sources is kept; of one name the last one's
    return [path for folder in folders for name in COPIES if (path := folder / name).is_file()]


class Recipe(NamedTuple):
    """What is made of what, and what of it has been found."""
    cfg: M.ModelConfig
    shapes: dict                        # our name: shape, of all that the model stores
    sources: list                       # in the order in which they are asked
    bases: dict                         # our name: what the delta's tensor is added to
    preset: str
    placed: tuple                       # tensors of the vocabulary, if their added tokens come from several sources
    targets: dict                       # our name: Target

    def fits(self, name, x):                            # or is nothing that the model has
        shape = tuple(x.like.shape)
        wanted = self.shapes.get(name, shape)
        if name in self.placed and shape[1:] == wanted[1:]:             # (V, C)
            return bool(self.preset) or shape[0] <= wanted[0]
        return shape == wanted

    def take(self, name, source):
        """Make a target of a tensor if the model has it, no other source gave it and it fits. -> (fate, note)"""
        x = source.tensors[name]
        if x is self.bases.get(name):                   # taken with the delta
            return "merged", ""
        if source.kind == "projector" and name == EMBED:
            return "merged", "rows of added tokens"
        if name not in self.shapes:
            fate = "dropped" if self.preset else "UNEXPECTED"           # a preset takes what fits
            return NOT_NEEDED.get(name, (fate, f"{self.preset or 'a model of these sizes'} has no such tensor"))
        if name in self.targets:
            shared = name in self.placed and any(x is other for other, *_ in self.targets[name].tokens[1])
            return ("merged", "rows of added tokens") if shared else ("dropped", "another source gives it")
        if not self.fits(name, x):
            return "MISMATCHED", f"{[*x.like.shape]}, where the model needs {list(self.shapes[name])}"
        return self.add(name, source)

    def add(self, name, source):                        # a target -> (fate, note)
        x, tokens = source.tensors[name], self.tokens(name) if name in self.placed else ()
        target = Target(x, self.shapes[name], x.like.dtype, tokens=tokens)
        if source.kind == "delta" and name in self.bases:               # a ChatBind's projector is whole
            target = target._replace(dtype=torch.float16, base=self.bases[name])
        self.targets[name] = target
        return "merged" if target.base else "renamed", ""

    def learned(self, source, name):                    # {added token: row} in a source's tensor of the vocabulary
        x = source.tensors.get(name)
        if x is None or x.like.shape[1:] != self.shapes[name][1:]:
            return {}
        first = self.bases[EMBED].like.shape[0] if source.kind == "delta" else 0        # a delta has these whole
        return {token: row for token, row in source.tokens().items() if row >= first}

    def tokens(self, name):                             # of a Target: each token of the first that has learned it
        keep = min(self.cfg.added_tokens.values(), default=self.shapes[name][0]) if self.preset else None
        out, missing = [], dict(self.cfg.added_tokens)
        for source in self.sources:
            rows = self.learned(source, name)
            if new := {rows[token]: missing.pop(token) for token in rows if token in missing}:
                out.append((source.tensors[name], [*new], [*new.values()]))
        return keep, out

    def gather(self):                                   # -> rows of the report on what the sources hold
        report = [row for source in self.sources for row in source.rows]
        for source in self.sources:
            unfit = {part_of(name) for name, x in source.tensors.items() if self.preset and not self.fits(name, x)}
            for name, x in source.tensors.items():
                part = part_of(name)
                fate, note = self.take(name, source) if part not in unfit else ("dropped", "its part has other sizes")
                report.append(Row(str(source.path), source.kind, fate, x.key, part, note))
        return report

    def fill(self, model):
        """-> rows of the report for what no source gives. Of a preset, what training makes becomes a target."""
        rows, dtype = [], self.targets[EMBED].dtype if EMBED in self.targets else torch.float32
        for name in [name for name in self.shapes if name not in self.targets]:
            part = part_of(name)
            if self.preset and LEARNED.fullmatch(name):
                self.targets[name] = Target(Made(model, name, model.get_parameter(name)), self.shapes[name], dtype)
                rows.append(Row("no source", self.preset, "initialised", name, part, "to be trained"))
            else:
                note = f"for {name}; {GIVEN_BY.get(part, 'a whole model')} has it"
                note += ", --preset NAME makes it" * bool(LEARNED.fullmatch(name))
                rows.append(Row("", "", "MISSING", original(name) or name, part, note))
        return rows


def bases_of(base, delta, cfg):
    """{our name: what a delta is added to}. Refuses other sizes, and rows that no added tokens explain."""
    if base.size() != delta.size():
        raise Refused(f"{base.path} ({base.size()}) is not the base of {delta.path} ({delta.size()}); name that")
    rows, new = base.shape(EMBED)[0], cfg.llm.vocab_size
    fresh = {token for token, i in cfg.added_tokens.items() if i >= rows}       # no base has those around media
    if cfg.added_tokens and (new - rows != len(fresh) or cfg.added_tokens.keys() & {*TOKENS[1:]} - fresh):
        raise Refused(f"{base.path} has {rows} embedding rows, {delta.path} {new}, which its added tokens "
                      f"({', '.join(cfg.added_tokens)}) do not explain; name the base it was made against")
    bases = {name: x for name, x in base.tensors.items() if name.startswith("llm.")}
    if odd := bases.keys() ^ {name for name in delta.tensors if name.startswith("llm.")}:
        raise Refused(f"{base.path} is not the base of {delta.path}: only one of them has {min(odd)}; name that")
    for name, x in bases.items():
        old, new = tuple(x.like.shape), tuple(delta.tensors[name].like.shape)
        old = max(old, new[:1] + old[1:]) if name in (EMBED, HEAD) else old             # with rows of added tokens
        if old != new:
            raise Refused(f"{name}: {[*new]} in the delta, {[*x.like.shape]} in {base.path}; name its base")
    return bases


def skeleton(parts, preset):                            # the module of these sources, on meta
    with refusing(f"{[*parts.values()][-1].path}: {NO_MODEL}"), torch.device("meta"):
        if painter := parts.get("painter"):
            return G.Painter(painter_config(painter_files(painter), painter.path))
        return M.Model(M.PRESETS[preset] if preset else configure(parts))


def as_told(cfg, targets):
    """The config of a preset, with what only the files beside the taken language model tell of that."""
    norm = targets.get(NORM)                            # its source gives all of a language model
    if not norm or not (c := read_json(beside(norm.stored.path, "config.json"))):
        return cfg
    with refusing(f"{norm.stored.path}: {NO_MODEL}"):
        llm = llm_config(norm.stored.path, cfg.llm.vocab_size, c)
        ends = first_and_last(norm.stored.path, c)
    return replace(cfg, llm=replace(cfg.llm, **{name: getattr(llm, name) for name in TOLD}), **ends)


def plan_weights(paths, preset="", dtype="keep", merge_lora=False):
    """The Plan that makes one weights folder of public checkpoints. Reads headers, and norms to tell a delta."""
    if preset not in ("", *M.PRESETS):
        raise Refused(f"unknown preset {preset!r}; known: {', '.join(M.PRESETS)}")
    parts = open_sources(paths, preset)
    model = skeleton(parts, preset)
    cfg, own = model.cfg, ("delta", "projector", getattr(model.cfg, "system", ""))
    bases = bases_of(parts["llm"], parts["delta"], cfg) if "delta" in parts else {}
    # the first that has a tensor gives it: own system and additions, then whole language models, then the others
    sources = sorted(parts.values(), key=lambda source: (source.kind not in own, source.kind not in LLMS))
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items() if name not in M.tied(model)}
    recipe = Recipe(cfg, shapes, sources, bases, preset, (EMBED, HEAD) if preset or "projector" in parts else (), {})
    report = recipe.gather() + recipe.fill(model)
    cfg = as_told(cfg, recipe.targets) if preset else cfg
    if merge_lora and getattr(cfg, "llm", None):
        cfg, report = merge(recipe.targets, cfg, report)
    targets = {name: recipe.targets[name].cast(dtype) for name in shapes if name in recipe.targets}    # for M.fuse
    order = sorted(reversed(sources), key=lambda source: source.kind in (*LLMS, "delta", "nextgpt"))
    folders = [beside(source.path, "tokenizer" if source.kind == "painter" else "") for source in order]
    return Plan({"model": targets}, {}, tokenizer_files(folders), report, cfg)


def merge(targets, cfg, report):                        # let the weights absorb their LoRA -> config, report
    for a in [name for name in targets if name.endswith("lora_A")]:
        b, weight = a.replace("lora_A", "lora_B"), a.replace("lora_A", "weight")
        if {b, weight} <= targets.keys():               # else one is reported missing
            lora = targets.pop(b).stored, targets.pop(a).stored, cfg.llm.lora_alpha / cfg.llm.lora_rank
            targets[weight] = targets[weight]._replace(lora=lora)
    report = [row._replace(fate="merged") if row.fate == "renamed" and ".lora_" in row.key else row for row in report]
    return replace(cfg, llm=replace(cfg.llm, lora_rank=0)), report


def named(config, table):                               # what a table names of a config of ours, under their names
    return {theirs: attrgetter(ours)(config) for theirs, ours in table.items()}


def their_config(cfg, dtype):                           # config.json of a LLaMA, of ChatBind or of NExT-Chat
    model_type, architecture, fields = PUBLIC.get(cfg.system, PUBLIC["plain"])
    out = named(cfg.llm, LLM_FIELDS) | named(cfg, fields) | {
        "model_type": model_type, "hidden_act": "silu", "architectures": [architecture],
        "head_dim": cfg.llm.head_dim or cfg.llm.dim // cfg.llm.n_head, "torch_dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": cfg.bos, "eos_token_id": list(cfg.eos) if len(cfg.eos) > 1 else cfg.eos[0]}
    if cfg.llm.rope_factor != 1:
        out["rope_scaling"] = {"rope_type": "llama3"} | named(cfg.llm, ROPE_FIELDS)
    return out | {"use_mm_proj": True, "mm_use_im_start_end": True} if fields else out


def plan_export(folder, dtype="keep"):
    """The Plan that writes a weights folder under the public names: that of the LLaMA or CLIP, with ImageBind."""
    cfg, folder = M.read_config(folder), Path(folder)
    table = NEXTCHAT if cfg.system == "nextchat" else TABLE
    files, texts, report = {}, {"added_tokens.json": cfg.added_tokens} if cfg.added_tokens else {}, []
    for name, x in open_files(folder).items():
        key, part = original(name, [table]), part_of(name)
        if not key:
            raise Refused(f"{folder}: {name} has no public name; what has all of them is a LLaMA, a CLIP, an "
                          "ImageBind, a ChatBind or a NExT-Chat, without LoRA and not quantised")
        report.append(Row(str(folder), "weights", "renamed", name, part, key))
        file = "imagebind" if part == "readers.imagebind.tower" else "model"
        files.setdefault(file, {})[key] = Target(x, tuple(x.like.shape), x.like.dtype).cast(dtype)
    if cfg.imagebind and "text" in cfg.imagebind.towers:        # the original's strict load asks for it
        n = cfg.imagebind.towers["text"].size[0]
        key, mask = "modality_preprocessors.text.mask", torch.full((n, n), -torch.inf).triu(1)
        files["imagebind"][key] = Target(Stored(folder, key, mask), (n, n), mask.dtype)
    if cfg.llm:
        texts["config.json"] = their_config(cfg, files["model"]["model.embed_tokens.weight"].dtype)
    elif cfg.clip:
        texts["config.json"] = named(cfg.clip, CLIP_FIELDS) | {
            "model_type": "clip_vision_model", "architectures": ["CLIPVisionModel"], "hidden_act": "quick_gelu"}
    return Plan(files, texts, tokenizer_files([folder]), report)


def say(text, file=None):                               # names found in files could move the cursor
    print(re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", "?", text), file=file, flush=True)


def show_sources(report):                               # how many keys of each went where, or why they are dropped
    for (source, kind), total in Counter((row.source, row.kind) for row in report if row.source).items():
        say(f"{source}: {kind}, {total} keys")
        rows = [row for row in report if row.source == source]
        counts = Counter((row.fate, row.note if row.fate == "dropped" else row.part) for row in rows)
        for (fate, what), n in counts.items():
            say(f"    {n:6} {fate:10} {what}")


def show_keys(rows, limit):                             # the first ones of each fate
    for fate, n in Counter(row.fate for row in rows).items():
        lines = [f"{row.key}  {row.note}" for row in rows if row.fate == fate][:limit]
        say("\n    ".join([f"{fate} {n}", *lines]))
        if len(lines) < n:
            say(f"    ... and {n - limit} more; --verbose lists them")


def show(plan, verbose=False):
    """Print what happens to each key: counts first, then whatever stops the conversion (verbose: everything)."""
    show_sources(plan.report)
    show_keys([row for row in plan.report if verbose or row.fate.isupper()], limit=None if verbose else 20)
    if (bind := getattr(plan.cfg, "imagebind", None)) and not bind.towers:
        say("note: without an ImageBind tower this model reads no media; add imagebind_huge.pth to the sources")
    if getattr(plan.cfg, "llm", None) and "tokenizer.model" not in {path.name for path in plan.copies}:
        say("note: no source has a tokenizer.model beside it; put that of the language model into the new folder")
    say(f"{sum(map(len, plan.files.values()))} tensors, {plan.nbytes / 1e9:.2f} GB to write")


def check(plan):                                        # Raises Refused if the report says that something does not fit
    if bad := [row for row in plan.report if row.fate.isupper()]:
        raise Refused(f"{len(bad)} keys do not fit, first {bad[0].fate} {bad[0].key} ({bad[0].note}); "
                      "name all files of one model, and only those; --preset makes one of parts")


# ---- Writing

def clear(out):                                         # remove what dead runs left of it: out.tmp-1234 of process 1234
    for left in out.parent.glob("*.tmp-*"):
        if found := re.fullmatch(re.escape(out.name) + r"(\.tmp-(\d+))+", left.name):
            try:
                os.kill(int(found[2]), 0)               # signal 0 only asks
            except ProcessLookupError:
                shutil.rmtree(left)
            except PermissionError:                     # it lives, and is someone else's
                pass


def make_room(out, nbytes, sources, overwrite):         # raise Refused if out must not be written or is too large
    if out.exists() and not overwrite:
        raise Refused(f"{out} exists; choose another --out, or add --overwrite to replace it")
    for path in out.glob("*"):
        if path.is_dir() or not WRITTEN.fullmatch(path.name):
            raise Refused(f"{out} is not replaced, for it holds {path.name}, which no conversion wrote; "
                          "move that away or choose another --out")
    if any(Path(source).resolve().is_relative_to(out) for source in sources):
        raise Refused(f"{out} holds a source; choose another --out")
    if nbytes > (free := shutil.disk_usage(out.parent).free):
        raise Refused(f"{out}: needs {nbytes / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free")


def split(targets, stem, limit):          # {file name: targets}, each of one tensor or at most limit bytes
    shards, room = [], -1                               # wide types first: numbers lie at multiples of their width
    for name, target in sorted(targets.items(), key=lambda item: -item[1].dtype.itemsize):
        if target.nbytes > room:
            shards.append({})
            room = limit
        shards[-1][name] = target
        room -= target.nbytes
    if len(shards) == 1:
        return {f"{stem}.safetensors": shards[0]}
    return {f"{stem}-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, 1)}


def write_shard(path, targets, bar):                    # each tensor is computed when its turn comes
    def values():
        for target in targets.values():
            yield target.value()
            bar.update(target.nbytes)
    bar.set_description(path.name)
    M.write_tensors(path, targets, values())


def write(plan, out, sources, max_shard=5e9, overwrite=False, quantize=""):     # whole or not at all
    check(plan)
    if quantize and not getattr(plan.cfg, "llm", None):
        raise Refused("--quantize is for language models, and here is none")
    out = Path(out).resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    clear(out)
    make_room(out, plan.nbytes * (2 if quantize else 1), sources, overwrite)
    with M.new_folder(out) as new, tqdm(total=plan.nbytes, unit="B", unit_scale=True, disable=None) as bar:
        for path in plan.copies:
            shutil.copyfile(path, new / path.name)
        files, texts = plan.layout(max_shard)
        for name, targets in files.items():
            write_shard(new / name, targets, bar)
        for name, values in texts.items():
            (new / name).write_text(json.dumps(values, indent=1))
        if plan.cfg:
            M.write_config(plan.cfg, new)
        if quantize:                                    # in place of the floats, which are mapped
            M.save(M.load(new, quantize=quantize), new, plan.copies)


def convert(sources, out, *, preset="", dtype="keep", merge_lora=False, max_shard=5e9, overwrite=False):
    """Make the weights folder `out` of public checkpoints (paths). Raises Refused, a ValueError, with what to do."""
    write(plan_weights(sources, preset, dtype, merge_lora), out, sources, max_shard, overwrite)


def main(args):
    plan = (plan_export(args.export, args.dtype) if args.export else
            plan_weights(args.sources, args.preset, args.dtype, args.merge_lora))
    show(plan, args.verbose)
    if args.report:
        args.report.write_text(json.dumps([row._asdict() for row in plan.report], indent=1))
    check(plan)
    if not args.dry_run:
        write(plan, args.out, args.sources or [args.export], args.max_shard, args.overwrite, args.quantize)
        say(f"wrote {args.out}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)           # so that an unfinished folder goes then, too
    try:
        main(ARGS)
    except KeyboardInterrupt:
        sys.exit(130)                                   # as shells do: 128 + SIGINT
    except (Refused, OSError, ValueError) as error:
        say(f"error: {error}", file=sys.stderr)
        sys.exit(getattr(error, "code", 2))
