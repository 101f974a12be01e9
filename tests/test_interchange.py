"""Files go to diffusers' own loaders and come back from them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from coneslab.diffusion.encoding import encode_prompts
from coneslab.diffusion.kvspace import KVSpace
from coneslab.diffusion.sampling import start_noise
from coneslab.edits.base import Combined
from coneslab.edits.interchange import (
    WEIGHTS,
    export_custom_diffusion,
    export_tokens,
    import_custom_diffusion,
    import_lora,
    import_tokens,
)
from coneslab.edits.tokens import TokenEdit, embedding_of, vocabulary_fingerprint
from coneslab.errors import ConeslabError, FileFormatError, MismatchError
from coneslab.methods import custom_diffusion


def draw(pipe, prompt):
    made = pipe(prompt, num_inference_steps=3, guidance_scale=3.0, latents=start_noise(pipe, [0]), output_type="np")
    return made.images[0]


def learned(pipe, *tokens):
    torch.manual_seed(0)
    vectors = torch.randn(len(tokens), embedding_of(pipe).weight.shape[1])
    return TokenEdit(tokens, vectors, vocabulary_fingerprint(pipe))


def test_diffusers_loads_our_tokens_and_we_load_theirs(v_pipe, tmp_path):
    edit = learned(v_pipe, "<cat*>", "sks")
    with pytest.raises(ConeslabError, match='names={"sks": "<sks>"}'):
        export_tokens(edit, v_pipe, tmp_path)
    with pytest.raises(ConeslabError, match=r"two tokens would be called <cat\*>"):
        export_tokens(edit, v_pipe, tmp_path, names={"sks": "<cat*>"})
    files = export_tokens(edit, v_pipe, tmp_path, names={"sks": "<sks>"})
    with edit.applied(v_pipe):
        expected = encode_prompts(v_pipe, ["a <cat*> cat", "a sks cat"])
    theirs = copy.deepcopy(v_pipe)
    for file in files:
        theirs.load_textual_inversion(str(file))
    assert torch.allclose(encode_prompts(theirs, ["a <cat*> cat", "a <sks> cat"]), expected, atol=1e-6)
    again = import_tokens(v_pipe, files[0])
    assert again.tokens == ("<cat*>",) and torch.equal(again.vectors[0], edit.vectors[0])


def test_an_embedding_of_several_vectors_is_written_out_as_diffusers_does(v_pipe, tmp_path):
    width = embedding_of(v_pipe).weight.shape[1]
    vectors = torch.randn(3, width)
    save_file({"emb_params": vectors}, tmp_path / "many.safetensors")  # as AUTOMATIC1111 writes it
    with pytest.raises(ConeslabError, match="does not name its token"):
        import_tokens(v_pipe, tmp_path / "many.safetensors")
    edit = import_tokens(v_pipe, tmp_path / "many.safetensors", token="<many>")
    assert edit.tokens == ("<many>", "<many>_1", "<many>_2")
    theirs = copy.deepcopy(v_pipe)
    theirs.load_textual_inversion(str(tmp_path / "many.safetensors"), token="<many>")
    with edit.applied(v_pipe):
        ours, drawn = encode_prompts(v_pipe, ["a <many> cat"]), draw(v_pipe, "a <many> cat")
    assert torch.allclose(ours, encode_prompts(theirs, ["a <many> cat"]), atol=1e-6)
    assert np.allclose(drawn, draw(theirs, "a <many> cat"), atol=1e-4)


@pytest.mark.slow
def test_custom_diffusion_weights_work_in_diffusers_and_come_back(v_pipe, pictured, tmp_path):
    vars(pictured).update(token="<cat*>", prompt="a <cat*> cat")
    edit = custom_diffusion(
        v_pipe, pictured, steps=3, batch_size=4, prior_batch_size=0, learning_rate=1e-2, initial="cat", progress=False
    )
    files = export_custom_diffusion(edit, v_pipe, tmp_path)
    assert [file.name for file in files] == [WEIGHTS, "_cat__.safetensors"]
    with edit.applied(v_pipe):
        expected, theta = draw(v_pipe, "a <cat*> cat"), KVSpace(v_pipe).gather()
    theirs = copy.deepcopy(v_pipe)
    # diffusers 0.42 puts the processors in place only if it is given the pipeline, by a private name
    theirs.unet.load_attn_procs(str(tmp_path), weight_name=WEIGHTS, _pipeline=theirs)
    theirs.load_textual_inversion(str(files[1]))
    assert np.allclose(draw(theirs, "a <cat*> cat"), expected, atol=1e-3)
    assert not np.allclose(draw(v_pipe, "a cat"), expected, atol=1e-2)
    with pytest.raises(ConeslabError, match="on at 0.5 of its parts"):
        export_custom_diffusion(Combined(edit.edits, 0.5), v_pipe, tmp_path / "half")
    back = import_custom_diffusion(v_pipe, tmp_path)
    with back.applied(v_pipe):
        assert torch.allclose(KVSpace(v_pipe).gather(), theta, atol=1e-6)
        assert np.allclose(draw(v_pipe, "a <cat*> cat"), expected, atol=1e-3)
    # and what diffusers itself saves
    theirs.unet.save_attn_procs(str(tmp_path / "theirs"), weight_name=WEIGHTS, safe_serialization=True)
    again = import_custom_diffusion(v_pipe, tmp_path / "theirs")
    with again.applied(v_pipe):
        assert torch.allclose(KVSpace(v_pipe).gather(), theta, atol=1e-6)


def test_a_name_for_a_token_that_is_not_there_is_refused(v_pipe, tmp_path):
    edit = TokenEdit(("sks",), torch.ones(1, 24), vocabulary_fingerprint(v_pipe))
    with pytest.raises(ConeslabError, match="names are given for sk, but the tokens are sks"):
        export_tokens(edit, v_pipe, tmp_path / "new", names={"sk": "<sks>"})
    assert not (tmp_path / "new").exists()


def test_foreign_files_are_refused(v_pipe, sd_pipe, tmp_path):
    (tmp_path / "pickle.bin").write_bytes(b"\x80\x04pickle")
    with pytest.raises(FileFormatError, match="never loaded"):
        import_tokens(v_pipe, tmp_path / "pickle.bin")
    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, tmp_path / "two.safetensors")
    with pytest.raises(FileFormatError, match="2 tensors, expected one"):
        import_tokens(v_pipe, tmp_path / "two.safetensors")
    save_file({"<x>": torch.zeros(7)}, tmp_path / "narrow.safetensors")
    with pytest.raises(MismatchError, match="learned for another model"):
        import_tokens(v_pipe, tmp_path / "narrow.safetensors")
    edit = TokenEdit(("sks",), torch.zeros(1, 24), "x").save(tmp_path / "edit.safetensors")
    with pytest.raises(FileFormatError, match="is an edit of this package.*load_edit"):
        import_lora(v_pipe, edit)
    save_file({"x": torch.zeros(2)}, tmp_path / WEIGHTS)
    with pytest.raises(FileFormatError, match="lacks"):
        import_custom_diffusion(v_pipe, tmp_path)
    with pytest.raises(FileNotFoundError):
        import_custom_diffusion(v_pipe, tmp_path / "nowhere")
