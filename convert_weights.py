"""Public checkpoints to weights folders and back.

In order: tables (theirs, ours), the engine that applies them.
"""
import re

# ---- Tables
# A row is (theirs, ours). {} is an index, {a,b} one of the words (on both sides, matched by place), * the rest;
# ours None = dropped on purpose. Read from right to left the same rows export.

LLAMA = [
    ("model.embed_tokens.*",                            "llm.embed.*"),
    ("model.layers.{}.self_attn.{q,k,v,o}_proj.*",      "llm.blocks.{}.attn.w{q,k,v,o}.*"),
    ("model.layers.{}.self_attn.rotary_emb.inv_freq",   None),                  # recomputed
    ("model.layers.{}.mlp.{gate,up,down}_proj.*",       "llm.blocks.{}.mlp.{gate,up,down}.*"),
    ("model.layers.{}.input_layernorm.*",               "llm.blocks.{}.attn_norm.*"),
    ("model.layers.{}.post_attention_layernorm.*",      "llm.blocks.{}.mlp_norm.*"),
    ("model.norm.*",                                    "llm.norm.*"),
    ("lm_head.*",                                       "llm.lm_head.*"),
]
CLIP = [
    ("vision_model.embeddings.class_embedding",         "readers.clip.tower.cls"),
    ("vision_model.embeddings.patch_embedding.*",       "readers.clip.tower.patch.*"),
    ("vision_model.embeddings.position_embedding.*",    "readers.clip.tower.pos.*"),
    ("vision_model.embeddings.position_ids",            None),                  # 0, 1, 2, ...
    ("vision_model.{pre_layrnorm,post_layernorm}.*",    "readers.clip.tower.{pre_norm,norm}.*"),
    ("vision_model.encoder.layers.{}.self_attn.{q_proj,k_proj,v_proj,out_proj}.*",
     "readers.clip.tower.blocks.{}.attn.{wq,wk,wv,wo}.*"),
    ("vision_model.encoder.layers.{}.layer_norm{1,2}.*", "readers.clip.tower.blocks.{}.{attn_norm,mlp_norm}.*"),
    ("vision_model.encoder.layers.{}.mlp.*",            "readers.clip.tower.blocks.{}.mlp.*"),
    ("text_model.*",                                    None),                  # the text tower; chat models do not use it
    ("{visual_projection,text_projection}.weight",      None),
    ("logit_scale",                                     None),
]
MODALITY, GRID = "{vision,text,audio,depth,thermal,imu}", "{vision,audio,depth,thermal}"
TOWER = "readers.imagebind.tower.towers."
IMAGEBIND = [
    ("modality_preprocessors." + MODALITY + ".cls_token",                       TOWER + MODALITY + ".cls"),
    ("modality_preprocessors.vision.rgbt_stem.proj.1.weight",                   TOWER + "vision.stem.weight"),
    ("modality_preprocessors.{audio,thermal}.rgbt_stem.proj.weight",            TOWER + "{audio,thermal}.stem.weight"),
    ("modality_preprocessors.{audio,thermal}.rgbt_stem.norm_layer.*",           TOWER + "{audio,thermal}.stem_norm.*"),
    ("modality_preprocessors.depth.depth_stem.proj.weight",                     TOWER + "depth.stem.weight"),
    ("modality_preprocessors.depth.depth_stem.norm_layer.*",                    TOWER + "depth.stem_norm.*"),
    ("modality_preprocessors.imu.imu_stem.proj.weight",                         TOWER + "imu.stem.weight"),
    ("modality_preprocessors.imu.imu_stem.norm_layer.*",                        TOWER + "imu.stem_norm.*"),
    ("modality_preprocessors.text.token_embedding.weight",                      TOWER + "text.stem.weight"),
    ("modality_preprocessors.text.mask",                                        None),      # causal, rebuilt
    ("modality_preprocessors." + GRID + ".pos_embedding_helper.pos_embed",      TOWER + GRID + ".pos"),
    ("modality_preprocessors.{text,imu}.pos_embed",                             TOWER + "{text,imu}.pos"),
    ("modality_trunks." + MODALITY + ".pre_transformer_layer.0.*",              TOWER + MODALITY + ".pre_norm.*"),
    ("modality_trunks." + MODALITY + ".blocks.{}.norm_{1,2}.*",                 TOWER + MODALITY + ".blocks.{}.{attn_norm,mlp_norm}.*"),
    ("modality_trunks." + MODALITY + ".blocks.{}.mlp.*",                        TOWER + MODALITY + ".blocks.{}.mlp.*"),
    ("modality_trunks." + MODALITY + ".blocks.{}.attn.in_proj_{weight,bias}",   TOWER + MODALITY + ".blocks.{}.attn.wqkv.{weight,bias}"),
    ("modality_trunks." + MODALITY + ".blocks.{}.attn.out_proj.*",              TOWER + MODALITY + ".blocks.{}.attn.wo.*"),
    ("modality_trunks." + MODALITY + ".blocks.{}.attn.bias_{k,v}",              TOWER + MODALITY + ".blocks.{}.attn.bias_{k,v}"),
    ("modality_heads." + GRID + ".0.*",                                         TOWER + GRID + ".norm.*"),
    ("modality_heads." + GRID + ".2.weight",                                    TOWER + GRID + ".head.weight"),
    ("modality_heads.imu.{0,3}.*",                                              TOWER + "imu.{norm,head}.*"),
    ("modality_heads.text.proj.{0,1}.*",                                        TOWER + "text.{norm,head}.*"),
    ("modality_postprocessors." + MODALITY + ".1.log_logit_scale",              TOWER + MODALITY + ".log_scale"),
]
PROJECTOR = [("model.mm_projector.*",                   "readers.imagebind.projector.*")]
CHATBIND = LLAMA + PROJECTOR


# ---- Engine

HOLES = re.compile(r"\{([^}]*)\}|(\*)")


def rewrite(key, pattern, target):
    """The name `target` gives to `key` if `pattern` matches it in full, else None. Words map by place, the rest is copied."""
    words, regex, at = [], "", 0
    for hole in HOLES.finditer(pattern):
        words.append(hole[1] and hole[1].split(","))
        inner = r"\d+" if hole[1] == "" else ".+" if hole[2] else "|".join(map(re.escape, words[-1]))
        regex += re.escape(pattern[at:hole.start()]) + f"({inner})"
        at = hole.end()
    match = re.fullmatch(regex + re.escape(pattern[at:]), key)
    if not match:
        return None
    groups = iter(zip(words, match.groups()))

    def fill(hole):
        names, found = next(groups)
        return hole[1].split(",")[names.index(found)] if names else found
    return HOLES.sub(fill, target)


def translate(key, table):
    """Our name of their key, or None if it is dropped. Raises KeyError unless exactly one row matches."""
    hits = [(theirs, ours) for theirs, ours in table if rewrite(key, theirs, theirs) is not None]
    if len(hits) != 1:
        raise KeyError(f"{key} is matched by {len(hits)} rows" + "".join(f"; {theirs}" for theirs, _ in hits))
    theirs, ours = hits[0]
    return ours and rewrite(key, theirs, ours)


def rename(state, table):
    """A whole state dict under our names. Raises KeyError for a key that no row, two rows or another key already took."""
    out = {}
    for key, value in state.items():
        name = translate(key, table)
        if name in out:
            raise KeyError(f"{key} and another key both become {name}")
        if name is not None:
            out[name] = value
    return out
