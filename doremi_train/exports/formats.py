"""Export targets: weights in the form of the trainers that people already use, and back.

A target is one entry of `FORMATS`, which says all about it; commands, messages, the table in
`docs/export.md` and tests follow from the entries.

A weight is a part of the tokens. A trainer that draws sequences of one length takes it as it is;
one that draws documents needs p_k ∝ w_k / (mean tokens per document of k). Which one draws what is
read off its source, and the entry says where.

Zeros are left out, where the trainer does not ask for them: several reject one, or wait forever for
it.
"""

from doremi_train.exports import configs, modules
from doremi_train.exports.form import Format

FORMATS: dict[str, Format] = {
    "megatron": Format(
        trainer="Megatron-LM",
        file="for `--data-args-path FILE`, or `--data-path $(cat FILE)`",
        draws="sequences",
        because="BlendedDataset indexes samples of GPTDataset, which are of `sequence_length`",
        ending="txt",
        write=configs.megatron,
        read=configs.read_megatron,
        refuses=configs.megatron_splits,
    ),
    "nemo": Format(
        trainer="NeMo 2.x, Megatron-Bridge, Automodel",
        file="flat JSON list, for `paths`",
        draws="sequences",
        because="Megatron-LM's BlendedDataset",
        ending="json",
        write=configs.nemo,
        read=configs.read_nemo,
    ),
    "energon": Format(
        trainer="Megatron-Energon",
        file="YAML, a `MetadatasetV2` with a `blend` to train on, for `get_train_dataset`",
        draws="documents",
        because="BlendDataset draws samples, before a task encoder packs them",
        ending="yaml",
        write=configs.energon,
        read=configs.read_energon,
    ),
    "gpt_neox": Format(
        trainer="GPT-NeoX",
        file="YAML, `train-data-paths` and `train-data-weights`",
        draws="sequences",
        because="BlendableDataset, as Megatron-LM's; unless `weight_by_num_documents`, which "
        "overrides the weights",
        ending="yml",
        write=configs.gpt_neox,
        read=configs.read_gpt_neox,
        tells=configs.gpt_neox_tells,
    ),
    "nanotron": Format(
        trainer="nanotron",
        file="YAML of data stages, several where the mixture is staged",
        draws="sequences",
        because="Nanoset counts samples of `sequence_length` tokens",
        ending="yaml",
        write=configs.nanotron,
        read=configs.read_nanotron,
        write_stages=configs.nanotron_stages,
        tells=configs.nanotron_tells,
    ),
    "mosaicml_streaming": Format(
        trainer="MosaicML Streaming, llm-foundry",
        file="YAML `streams`, for llm-foundry's dataset or `Stream(**fields)` of each",
        draws="sequences",
        because="a draw is a sample of the MDS, which llm-foundry writes with `--concat_tokens`",
        ending="yaml",
        write=configs.mosaicml_streaming,
        read=configs.read_mosaicml_streaming,
    ),
    "datasets": Format(
        trainer="datasets",
        file="Python, `mixture()` with `interleave_datasets`",
        draws="documents",
        because="`interleave_datasets` draws rows",
        ending="py",
        write=modules.datasets,
        read=modules.read_module,
    ),
    "olmo_core": Format(
        trainer="OLMo-core",
        file="YAML of a `SourceMixtureList`",
        draws="sequences",
        because="it takes `target_ratio` · `requested_tokens` tokens of each source",
        ending="yaml",
        write=configs.olmo_core,
        read=configs.read_olmo_core,
    ),
    "olmo_core_composable": Format(
        trainer="OLMo-core, its composable sources",
        file="Python, `mixture(tokenizer, sequence_length, num_tokens)`, for a "
        "`ComposableDataLoader`",
        draws="sequences",
        because="MixingInstanceSource takes instances of `sequence_length` tokens",
        ending="py",
        write=modules.olmo_core_composable,
        read=modules.read_module,
    ),
    "torchtitan": Format(
        trainer="torchtitan",
        file="Python, `mixture()`, a dataloader's config; `mixture_of_main()` for its main",
        draws="sequences",
        because="InterleavedDataset draws elements of its sources, which are packed",
        ending="py",
        write=modules.torchtitan,
        read=modules.read_module,
    ),
    "litdata": Format(
        trainer="LitData, LitGPT",
        file="Python, `mixture(block_size)` with `CombinedStreamingDataset`",
        draws="sequences",
        because="TokensLoader gives blocks of tokens",
        ending="py",
        write=modules.litdata,
        read=modules.read_module,
    ),
    "levanter": Format(
        trainer="Levanter",
        file="YAML, `train_weights`, staged where the mixture is",
        draws="sequences",
        because="MixtureDataset draws from datasets of token sequences, in blocks of "
        "`mixture_block_size`",
        ending="yaml",
        write=configs.levanter,
        read=configs.read_levanter,
        paths=False,
        write_stages=configs.levanter_stages,
        every=configs.levanter_every,
        tells=configs.levanter_tells,
    ),
    "maxtext": Format(
        trainer="MaxText",
        file="JSON, for `grain_train_mixture_config_path`",
        draws="documents",
        because="`grain.IterDataset.mix` draws records, which are packed afterwards",
        ending="json",
        write=configs.maxtext,
        read=configs.read_maxtext,
        refuses=configs.maxtext_reads,
        tells=configs.maxtext_tells,
    ),
    "llama_factory": Format(
        trainer="LLaMA-Factory",
        file="YAML, `dataset` and `interleave_probs`",
        draws="documents",
        because="`interleave_datasets` draws examples, which are packed afterwards",
        ending="yaml",
        write=configs.llama_factory,
        read=configs.read_llama_factory,
        paths=False,
        refuses=configs.llama_factory_splits,
        tells=configs.llama_factory_tells,
    ),
    "lingua": Format(
        trainer="lingua",
        file="YAML, `data.sources`",
        draws="documents",
        because="`choose_source` draws lines, which are packed afterwards",
        ending="yaml",
        write=configs.lingua,
        read=configs.read_lingua,
        paths=False,
    ),
    "webdataset": Format(
        trainer="webdataset",
        file="Python, `mixture()` with `RandomMix`",
        draws="documents",
        because="RandomMix draws samples, a text each",
        ending="py",
        write=modules.webdataset,
        read=modules.read_module,
        refuses=modules.webdataset_cuts,
    ),
    "doremi": Format(
        trainer="DoReMi",
        file="the original's JSON",
        draws="sequences",
        because="it draws examples, which its preprocessing makes of one length",
        ending="json",
        write=configs.doremi,
        read=configs.read_doremi,
        paths=False,
        zeros=True,
    ),
}
"""A mixture for a trainer, and back from its file:

>>> from doremi_train.exports import convert
>>> paths = {"web": "/data/web", "code": "/data/code"}
>>> text = convert.write("megatron", {"web": 0.75, "code": 0.25}, paths, {})
>>> print(text)
0.75 /data/web
0.25 /data/code
<BLANKLINE>
>>> convert.read("megatron", text, ["code", "web"], paths, "the file")
{'code': 0.25, 'web': 0.75}
"""
