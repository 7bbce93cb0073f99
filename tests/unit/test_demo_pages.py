"""The pages as Streamlit runs them, without a browser: what they open on, what they ask for, what they say."""

import io
import json
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image
from streamlit import config
from streamlit.testing.v1 import AppTest

from demo import engine as engines
from demo import model_control, sample_controls, session, training_process
from demo.processes import REPOSITORY
from demo.training_plan import name_of
from demo.training_view import whole_pictures
from dreambooth_ms.adapters.file import CUSTOM_DIFFUSION
from dreambooth_ms.adapters.formulas import Update
from dreambooth_ms.adapters.word_files import write_words
from dreambooth_ms.adapters.writing import write_replacements
from dreambooth_ms.errors import ConfigError, WeightError
from dreambooth_ms.formats.files.dtypes import DType
from tests.tiny_model import write_random_model
from tests.whole_loras import write_run_lora

SCRIPT = str(REPOSITORY / "demo" / "sampling.py")
EMBEDDED = REPOSITORY / "checkpoints" / "tiny-shapes"
LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """The folder of runs of a page whose sampling process samples plain colours."""
    monkeypatch.setattr(engines, "WORKER", (sys.executable, "-m", "tests.stub_sampling_process"))
    monkeypatch.setattr(sys, "argv", ["sampling.py", "--runs", str(tmp_path / "runs")])
    before = config.get_option("server.address")
    config.set_option("server.address", "127.0.0.1")
    monkeypatch.setattr(session, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "runs").mkdir()
    for of_server in (session.engine, session.windows, model_control.downloads):
        of_server.clear()
    yield tmp_path / "runs"
    session.engine().close()
    session.engine.clear()
    config.set_option("server.address", before)


def write_run(folder, base=EMBEDDED):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        f"pretrained_model_name_or_path: {base}\ninstance_data_dir: x\ninstance_prompt: a photo of a sks star\n"
    )
    factors = {LAYER: (np.zeros((1, 64), np.float32), np.zeros((64, 1), np.float32))}
    write_run_lora(folder, {"unet": factors}, 3)
    return folder


def opened(**address):
    page = AppTest.from_file(SCRIPT, default_timeout=60)
    page.query_params.update(address)
    page.run()
    assert not page.exception
    return page


def sample(page):
    page.button("sample_button").click().run()
    return finished(page)


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def finished(page):
    job = page.session_state["window"].job
    wait_for(lambda: job is None or job.over)
    page.run()
    assert not page.exception
    return page


def gallery(page):
    return page.session_state["window"].gallery


def errors(page):
    return " ".join(error.value for error in page.error)


def test_it_opens_on_the_embedded_base_and_one_button_generates(runs):
    page = opened()
    assert page.selectbox("sample_model").value == str(EMBEDDED)
    assert page.text_area("sample_prompt").value == "a photo of a red circle on a blue background"
    assert any("10 of 75 tokens" in caption.value for caption in page.caption)
    sample(page)
    (entry,) = gallery(page)
    assert entry.request.prompt == "a photo of a red circle on a blue background"
    assert (entry.request.width, entry.request.height, entry.request.guidance_scale) == (64, 64, 3.0)


def test_it_opens_on_the_newest_run(runs):
    run = write_run(runs / "dog")
    page = opened()
    assert page.multiselect("sample_loras").value == [str(run)]
    assert page.text_area("sample_prompt").value == "a photo of a sks star"
    sample(page)
    (entry,) = gallery(page)
    assert entry.request.model.loras == (str(run),)
    assert list(entry.files) == ["adapted", "base"]


def test_settings_reach_the_request(runs):
    run = write_run(runs / "dog")
    page = opened()
    page.slider(f"scale {run}").set_value(0.5)
    page.selectbox("sample_size").set_value("Landscape")
    page.selectbox("sample_scheduler").set_value("euler")
    page.number_input("sample_steps").set_value(4)
    page.number_input("sample_count").set_value(2)
    page.number_input("sample_seed").set_value(77)
    page.text_area("sample_negative_prompt").set_value("green")
    page.toggle("sample_compare").set_value(False)
    page.run()
    sample(page)
    request = gallery(page)[0].request
    assert len(gallery(page)) == 2
    assert request.width > request.height
    assert (request.lora_scales, request.scheduler, request.num_inference_steps) == ((0.5,), "euler", 4)
    assert (request.seed, request.negative_prompt, request.compare) == (77, "green", False)


def test_settings_of_the_gallery_are_used_again(runs):
    page = opened()
    page.number_input("sample_seed").set_value(77)
    page.selectbox("sample_size").set_value("Landscape").run()
    sample(page)
    page.number_input("sample_seed").set_value(5)
    page.selectbox("sample_size").set_value("Square")
    page.text_area("sample_prompt").set_value("a star").run()
    page.button(f"again {gallery(page)[0].name}").click().run()
    assert page.number_input("sample_seed").value == 77
    assert page.selectbox("sample_size").value == "Landscape"
    assert page.text_area("sample_prompt").value == "a photo of a red circle on a blue background"


def test_a_new_seed_each_time(runs):
    page = opened()
    page.toggle("sample_random_seed").set_value(True).run()
    sample(page)
    sample(page)
    first, second = (entry.request.seed for entry in gallery(page))
    assert first != second
    assert page.number_input("sample_seed").value == first


def test_progress_and_cancel(runs):
    page = opened()
    page.text_area("sample_prompt").set_value("slow").run()
    page.button("sample_button").click().run()
    assert page.button("sample_button").disabled
    page.button("cancel_button").click().run()
    finished(page)
    assert "Cancelled" in page.info[0].value
    assert not page.button("sample_button").disabled


@pytest.mark.parametrize(("prompt", "sentence"), [("wrong", "no such model"), ("crash", "ended by itself")])
def test_what_goes_wrong_is_a_sentence_and_the_page_goes_on(runs, prompt, sentence):
    page = opened()
    page.text_area("sample_prompt").set_value(prompt).run()
    sample(page)
    assert sentence in errors(page)
    page.text_area("sample_prompt").set_value("a star").run()
    sample(page)
    assert len(gallery(page)) == 1
    assert not page.error


def test_a_page_that_is_loaded_again_shows_its_drawing(runs):
    page = opened()
    page.number_input("sample_seed").set_value(77)
    page.text_area("sample_prompt").set_value("slow").run()
    page.button("sample_button").click().run()
    address = page.query_params["window"]
    again = opened(window=address)
    assert (again.text_area("sample_prompt").value, again.number_input("sample_seed").value) == ("slow", 77)
    assert again.button("sample_button").disabled
    again.button("cancel_button").click().run()
    assert "Cancelled" in finished(again).info[0].value
    again.text_area("sample_prompt").set_value("a star").run()
    sample(again)
    assert gallery(opened(window=address)) == gallery(again) != []


def test_a_drawing_that_nobody_looks_at_is_shown_to_who_comes(runs, monkeypatch):
    page = opened()
    page.text_area("sample_prompt").set_value("slow").run()
    page.button("sample_button").click().run()
    assert not opened(window="unknown").session_state["window"].job
    monkeypatch.setattr(session, "LEFT_SECONDS", 0.0)
    later = opened()
    later.button("cancel_button").click().run()
    assert "Cancelled" in finished(later).info[0].value
    assert not opened().session_state["window"].job


def test_a_prompt_is_needed_and_long_ones_are_told(runs):
    page = opened()
    page.text_area("sample_prompt").set_value("  ").run()
    page.button("sample_button").click().run()
    assert "Write a prompt first" in errors(page)
    page.text_area("sample_prompt").set_value("star " * 80).run()
    assert any("only the first 75 are read" in caption.value for caption in page.caption)


def test_a_path_outside_is_refused(runs):
    page = AppTest.from_file(SCRIPT, default_timeout=60)
    page.session_state["sample_model"] = "/etc"
    page.run()
    assert "outside the folders of this page" in errors(page)
    assert not page.exception


def test_two_windows_do_not_mix(runs):
    one, other = opened(), opened()
    one.number_input("sample_seed").set_value(1).run()
    other.number_input("sample_seed").set_value(2).run()
    one.button("sample_button").click().run()
    other.button("sample_button").click().run()
    assert [entry.request.seed for entry in gallery(finished(one))] == [1]
    assert [entry.request.seed for entry in gallery(finished(other))] == [2]


def test_a_window_sees_how_many_requests_are_before_its_own(runs):
    one, other = opened(), opened()
    one.number_input("sample_steps").set_value(200)
    one.text_area("sample_prompt").set_value("slow").run()
    one.button("sample_button").click().run()
    other.button("sample_button").click().run()
    assert other.get("progress")[0].proto.text == "Waiting: 1 request before this one"
    other.button("cancel_button").click().run()
    assert "Cancelled" in finished(other).info[0].value
    one.button("cancel_button").click().run()
    assert "Cancelled" in finished(one).info[0].value


def png():
    file = io.BytesIO()
    Image.new("RGB", (100, 50), "red").save(file, "PNG")
    return file.getvalue()


def test_a_picture_to_start_from_is_fitted_and_a_bad_one_told(runs):
    page = opened()
    page.file_uploader("sample_picture").set_value(("a.png", b"MZ", "image/png")).run()
    assert "a.png: not a picture of a known format" in errors(page)
    page.file_uploader("sample_picture").set_value(("a.png", png(), "image/png"))
    page.slider("sample_strength").set_value(0.3).run()
    assert not page.error
    sample(page)
    request = gallery(page)[0].request
    assert (request.image.shape, request.strength) == ((64, 64, 3), 0.3)
    assert (request.image[..., 0] > 200).all()


def test_a_model_that_inpaints_is_given_a_picture_and_a_mask_of_its_size(runs):
    base = write_random_model(runs / "base", in_channels=9)
    page = opened()
    page.selectbox("sample_model").set_value(str(base)).run()
    page.file_uploader("sample_picture").set_value(("a.png", png(), "image/png"))
    page.text_area("sample_prompt").set_value("a star").run()
    assert any("and a mask of the same size" in caption.value for caption in page.caption)
    sample(page)
    assert gallery(page)[0].request.image is None
    mask = io.BytesIO()
    Image.new("LA", (100, 50), (255, 0)).save(mask, "PNG")  # Transparent: nothing is drawn anew.
    page.file_uploader("sample_mask").set_value(("m.png", mask.getvalue(), "image/png")).run()
    sample(page)
    request = gallery(page)[0].request
    assert (request.image.shape, request.mask.shape, request.strength) == ((32, 32, 3), (32, 32, 3), 1.0)
    assert (request.mask == 0).all()
    assert not page.exception


def test_a_lora_of_the_hub_is_fetched_and_chosen_and_a_path_is_refused(runs, tmp_path, monkeypatch):
    fetched = write_run(tmp_path / "hub") / "pytorch_lora_weights.safetensors"
    asked = []
    monkeypatch.setattr(sample_controls, "find_adapter", lambda name: asked.append(name) or fetched)
    page = opened()
    for name in (str(fetched), "../hub/pytorch_lora_weights.safetensors", "name"):
        page.text_input("hub_lora").set_value(name).run()
        page.button("fetch_lora").click().run()
        assert "expected owner/name" in errors(page)
    assert not asked
    page.text_input("hub_lora").set_value("owner/name").run()
    page.button("fetch_lora").click().run()
    assert asked == ["owner/name"]
    assert page.multiselect("sample_loras").value == [str(fetched)]
    assert not page.exception


def test_an_uploaded_lora_is_chosen_and_a_bad_one_told(runs, tmp_path):
    page = opened()
    page.file_uploader("lora_upload").set_value(("a.safetensors", b"no", "")).run()
    assert "a.safetensors" in errors(page.run()), "as long as the file is there"
    content = (write_run(tmp_path / "elsewhere") / "pytorch_lora_weights.safetensors").read_bytes()
    page.file_uploader("lora_upload").set_value(("mine.safetensors", content, "")).run()
    (chosen,) = page.multiselect("sample_loras").value
    assert "mine-" in chosen
    assert page.slider(f"scale {chosen}").value == 1.0
    assert not page.error
    other = opened()
    assert other.multiselect("sample_loras").options == [], "of another window"


def test_a_server_that_others_can_reach_shows_nothing(runs):
    for address in (None, "0.0.0.0"):
        config.set_option("server.address", address)
        page = opened()
        assert "--server.address 127.0.0.1" in errors(page)
        assert not page.button


def write_concept(folder, words=("<new1>",), layers=True, width=64):
    """What a run of Custom Diffusion on the embedded base leaves, or one of textual inversion."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        f"pretrained_model_name_or_path: {EMBEDDED}\ninstance_data_dir: x\n"
        f"method: {'custom_diffusion' if layers else 'textual_inversion'}\nmodifier_token: {'+'.join(words)}\n"
        f'instance_prompt: "a photo of a {words[0]} star"\n'
    )
    write_words({word: {"text_encoder": np.ones((1, width), np.float32)} for word in words}, folder, DType.F32, {})
    if layers:
        layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
        replaced = {layer: Update({"weight": np.zeros((64, width), np.float32)})}
        write_replacements(replaced, folder / CUSTOM_DIFFUSION, DType.F32, {})
    return folder


def test_words_of_what_is_chosen_are_buttons_that_write_them(runs):
    run = write_concept(runs / "star", ("<new1>", "<new2>"))
    page = opened()
    assert page.multiselect("sample_loras").value == [str(run)]
    assert page.text_area("sample_prompt").value == "a photo of a <new1> star"
    page.button("word <new2>").click().run()
    assert page.text_area("sample_prompt").value == "a photo of a <new1> star <new2>"
    page.multiselect("sample_loras").set_value([]).run()
    assert not page.exception
    assert "word <new2>" not in [button.key for button in page.button]


def test_embeddings_have_a_field_of_their_own(runs):
    run = write_concept(runs / "words", layers=False)
    page = opened()
    assert page.multiselect("sample_embeddings").value == [str(run)]
    assert page.multiselect("sample_loras").value == []
    sample(page)
    (entry,) = gallery(page)
    assert entry.request.model.embeddings == (str(run),)
    page.multiselect("sample_embeddings").set_value([]).run()
    assert not page.exception
    assert "word <new1>" not in [button.key for button in page.button]


def test_an_uploaded_embedding_is_chosen_as_one(runs, tmp_path):
    write_words({"<toy>": {"text_encoder": np.ones((1, 64), np.float32)}}, tmp_path, DType.F32, {})
    page = opened()
    assert "sample_embeddings" not in [one.key for one in page.multiselect]
    content = (tmp_path / "<toy>.safetensors").read_bytes()
    page.file_uploader("lora_upload").set_value(("<toy>.safetensors", content, "")).run()
    assert not page.exception
    (chosen,) = page.multiselect("sample_embeddings").value
    assert chosen.endswith(".safetensors")
    assert "word <toy>" in [button.key for button in page.button]


def test_the_page_opens_without_mindspore():
    program = "import sys, demo.sample_page, demo.teach_page; sys.exit('mindspore' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY).returncode == 0


def teach():
    """The page to teach on, by itself."""
    from demo import teach_page

    teach_page.show()


def test_the_page_to_teach_on_looks_at_photographs_and_knows_the_preset(runs):
    page = AppTest.from_function(teach, default_timeout=60).run()
    assert not page.exception
    assert page.selectbox("teach_model").value == str(EMBEDDED)
    assert page.number_input("teach_steps quickstart").value == 1200
    assert sum("64 × 64" in caption.value for caption in page.caption) == 5
    assert not page.button("teach_button").disabled


@pytest.mark.parametrize("method", ["custom_diffusion", "textual_inversion"])
def test_methods_of_new_words_ask_for_them(runs, method):
    page = AppTest.from_function(teach, default_timeout=60).run()
    assert "teach_words 1" not in [one.key for one in page.text_input]
    page.segmented_control("teach_method").set_value(method).run()
    assert not page.exception
    assert page.text_input("teach_words 1").value == "<new1>"
    assert page.text_input("teach_initial 1 True").value == "star"
    assert page.text_input("teach_prompt True by words").value == "a photo of a <new1> star"
    assert "teach_rank quickstart" not in [one.key for one in page.number_input]
    page.button("add_subject").click().run()
    assert page.text_input("teach_words 2").value == "<new1>+<new2>"
    assert page.text_input("teach_prompt True by words 2").value == "a photo of a <new2> star"
    assert not page.exception


def test_a_training_is_checked_before_it_starts(runs):
    page = AppTest.from_function(teach, default_timeout=120).run()
    page.button("teach_check").click().run()
    assert not page.exception
    report = page.code[0].value
    assert "instance: 5 pictures of 64x64, trained at 64x64, 0% cut off" in report
    assert "rare words of 'a photo of a sks star': sks" in report and "expected memory: " in report
    page.text_input("teach_prompt True").set_value(" ").run()
    assert not list(runs.iterdir())


def test_a_newcomer_is_told_that_the_embedded_base_knows_shapes_and_led_to_another(runs, monkeypatch, tmp_path):
    page = AppTest.from_function(teach, default_timeout=60).run()
    assert "knows flat shapes only" in page.info[0].value
    page.button("advised").click().run()
    assert page.selectbox("teach_model").value == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert "is not on this machine" in page.info[0].value
    begun, goes_on = threading.Event(), threading.Event()

    def find_model(name):
        part = tmp_path / "hub" / f"models--{name.replace('/', '--')}" / "blobs" / "1.incomplete"
        part.parent.mkdir(parents=True)
        part.write_bytes(bytes(10_000_000))
        begun.set()
        goes_on.wait(30)
        if name == "owner/none":
            raise WeightError("no such model")
        return EMBEDDED

    monkeypatch.setattr(model_control, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(model_control, "find_model", find_model)
    for name in ("owner/none", "owner/one"):
        begun.clear()
        goes_on.clear()
        page = AppTest.from_function(teach, default_timeout=60)
        page.session_state["teach_model"] = name
        page.run().button(f"fetch {name}").click().run()
        assert begun.wait(30)
        page.run()
        assert f"{name}: 0.01 GB are here" in page.info[0].value
        goes_on.set()
        wait_for(lambda name=name: not model_control.downloads()[name].is_alive())
        page.run()
        assert ("no such model" in errors(page)) == (name == "owner/none")
    assert page.button("teach_button")
    assert not page.exception


def test_a_model_that_the_hub_gave_is_named_as_there(runs, tmp_path):
    snapshot = tmp_path / "hub" / "models--owner--shapes" / "snapshots" / "4f9a"
    snapshot.mkdir(parents=True)
    for part in EMBEDDED.iterdir():
        (snapshot / part.name).symlink_to(part)
    page = AppTest.from_function(teach, default_timeout=60)
    page.session_state["teach_model"] = "owner/shapes"
    page.run()
    assert page.selectbox("teach_model").value == str(snapshot)
    assert page.selectbox("teach_model").options == ["tiny-shapes", "owner/shapes"]


def test_the_name_follows_the_prompt_until_it_is_written(runs):
    page = AppTest.from_function(teach, default_timeout=60).run()
    assert page.text_input("teach_name").value == "sks-star"
    write_run(runs / "zwx-heart")
    page.text_input("teach_prompt True").set_value("a photo of a zwx heart")
    page.text_input("teach_class True").set_value("a photo of a heart").run()
    assert page.text_input("teach_name").value == "zwx-heart-2"
    assert page.text_area("teach_validation True").value == "a photo of a zwx heart"
    page.text_input("teach_name").set_value("mine").run()
    page.text_input("teach_prompt True").set_value("a photo of a qxt heart").run()
    assert page.text_input("teach_name").value == "mine"


def test_a_training_that_cannot_start_leaves_nothing(runs, monkeypatch):
    page = AppTest.from_function(teach, default_timeout=60).run()
    page.button_group("teach_source").set_value("Upload").run()
    page.file_uploader("teach_upload").set_value([("a.png", png(), "image/png"), ("b.png", b"MZ", "image/png")]).run()
    assert "b.png: not a picture of a known format" in errors(page)
    assert "1 photograph" in " ".join(caption.value for caption in page.caption)

    def start(folder, arguments):
        assert list((folder / "photographs").iterdir())
        raise ConfigError("no room")

    monkeypatch.setattr(training_process, "start", start)
    page.button("teach_button").click().run()
    assert "no room" in errors(page)
    assert not list(runs.iterdir())


def test_mistakes_on_the_page_to_teach_on_are_sentences(runs):
    write_run(runs / "star")
    page = AppTest.from_function(teach, default_timeout=60).run()
    page.text_input("teach_name").set_value("star").run()
    page.button("teach_button").click().run()
    assert "there is a training of this name" in errors(page)
    page = AppTest.from_function(teach, default_timeout=60)
    page.session_state["teach_folder"] = "/etc"
    page.run()
    assert "outside the folders of this page" in errors(page)
    assert page.button("teach_button").disabled
    assert not page.exception


def test_a_training_that_is_over_is_shown_with_what_it_left(runs):
    run = write_run(runs / "dog")
    (run / "history.jsonl").write_text(
        "".join(
            f'{{"step": {step}, "loss": 0.5, "instance_loss": 0.5, "grad_norm": 1, "learning_rate": 0.001}}\n'
            for step in range(1, 9)
        )
    )
    page = AppTest.from_function(teach, default_timeout=60).run()
    page.button_group("teach_chosen").set_value("dog").run()
    assert not page.exception
    assert [metric.value for metric in page.metric][:2] == ["8", "0.5000"]
    assert not page.get("image")
    (run / "validation").mkdir()
    for name in ("step-000008-0.png", "step-000008.png", "over_time.png"):
        (run / "validation" / name).write_bytes(png())
    assert len(page.run().get("image")) == 2, "a picture, and the strip"
    assert page.button("sample_with_it")


TRAINING = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
print("training:  33%|###  | 2/6 [00:01<00:02,  3.50step/s]", flush=True)
time.sleep(60)
"""


def test_a_training_is_started_watched_stopped_and_resumed(runs, monkeypatch):
    monkeypatch.setattr(training_process, "PROGRAM", (sys.executable, "-c", TRAINING))
    page = AppTest.from_function(teach, default_timeout=60).run()
    page.number_input("teach_steps quickstart").set_value(6)
    page.text_input("teach_name").set_value("mine").run()
    page.button("teach_button").click().run()
    training = training_process.running(runs)
    assert training.name == "mine"
    assert page.button_group("teach_chosen").value == "mine"
    page.button("stop_training").click().run()
    wait_for(lambda: training.state == "stopped")
    page.run()
    page.button("resume_training").click().run()
    assert training.state == "running"
    training.stop()
    wait_for(lambda: training.state == "stopped")
    assert not page.exception
    assert not page.error


def test_pictures_that_are_cut_or_being_written_are_not_shown(tmp_path):
    for name, size in (("whole", None), ("cut", 40), ("begun", 0)):
        (tmp_path / name).write_bytes(png()[:size])
    assert whole_pictures([tmp_path / name for name in ("cut", "whole", "begun")]) == [png()]


@pytest.mark.parametrize(
    ("prompt", "class_prompt", "name"),
    [
        ("a photo of sks dog", "a photo of dog", "sks-dog"),
        ("a photo of a sks star", None, "sks-star"),
        ("a photo of zwx golden retriever dog, best quality", "a photo of a dog", "zwx-golden-retriever-dog"),
        ("A photograph of my cat Tom in the snow", None, "cat-tom"),
        ("zwx person wearing a hat", "photo of a person", "zwx-person"),
        ("一张sks狗的照片", None, "sks"),
        ("一只狗", "", "subject"),
    ],
)
def test_a_training_is_named_after_its_word_and_class(prompt, class_prompt, name):
    assert name_of([(prompt, class_prompt)]) == name


# --- subjects ---


def taught(page, monkeypatch):
    """What a training is started with: its folder's files are looked at while it is there."""
    calls = []

    def start(folder, arguments):
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        calls.append((folder, arguments, files))
        raise ConfigError("enough")

    monkeypatch.setattr(training_process, "start", start)
    page.button("teach_button").click().run()
    assert "enough" in errors(page)
    assert not page.exception
    return calls[0]


def upload(page, key, **files):
    content = [(f"{name}.png", file, "image/png") for name, file in files.items()]
    page.file_uploader(key).set_value(content).run()


def test_captions_are_written_beside_uploaded_photographs(runs, monkeypatch):
    page = AppTest.from_function(teach, default_timeout=60).run()
    page.button_group("teach_source").set_value("Upload").run()
    upload(page, "teach_upload", a=png())
    page.toggle("teach_captioned Upload").set_value(True).run()
    (caption,) = [area for area in page.text_area if area.label.startswith("Caption of a-")]
    assert caption.value == "a photo of a sks star"
    caption.set_value("a photo of a sks star, in the snow").run()
    folder, arguments, files = taught(page, monkeypatch)
    (text,) = [file for name, file in files.items() if name.startswith("photographs/a-") and name.endswith(".txt")]
    assert text.decode() == "a photo of a sks star, in the snow"
    assert arguments[arguments.index("--use_txt_as_label") + 1] == "True"
    assert arguments[arguments.index("--instance_data_dir") + 1] == str(folder / "photographs")


def test_subjects_are_added_taught_by_a_list_and_removed(runs, monkeypatch):
    page = AppTest.from_function(teach, default_timeout=60).run()
    page.button("add_subject").click().run()
    page.text_input("teach_prompt True 2").set_value("a photo of a zwx heart")
    page.text_input("teach_class True 2").set_value("a photo of a heart").run()
    assert page.text_input("teach_name").value == "sks-star-zwx-heart"
    assert page.text_area("teach_validation True").value == "a photo of a sks star\na photo of a zwx heart"
    folder, arguments, files = taught(page, monkeypatch)
    listed = json.loads(files["concepts.json"])
    assert [one["instance_prompt"] for one in listed] == ["a photo of a sks star", "a photo of a zwx heart"]
    assert arguments[arguments.index("--concepts_list") + 1] == str(folder / "concepts.json")
    assert "--instance_data_dir" not in arguments
    assert arguments.count("--validation_prompt") == 2
    page.button("remove_subject").click().run()
    assert page.text_input("teach_name").value == "sks-star"
    assert "--instance_data_dir" in taught(page, monkeypatch)[1]


def test_a_subject_without_photographs_cannot_be_taught(runs):
    page = AppTest.from_function(teach, default_timeout=60).run()
    page.button("add_subject").click().run()
    page.button_group("teach_source 2").set_value("Upload").run()
    assert page.button("teach_button").disabled
    assert not page.exception


def test_masks_belong_to_photographs_by_name(runs, monkeypatch):
    page = AppTest.from_function(teach, default_timeout=60).run()
    page.button_group("teach_source").set_value("Upload").run()
    upload(page, "teach_upload", a=png())
    page.button_group("teach_counts").set_value("Masks").run()
    assert "no mask of its name" in " ".join(caption.value for caption in page.caption)
    assert page.button("teach_button").disabled
    upload(page, "teach_masks", b=png())
    assert "b.png: no photograph has this name" in errors(page)
    upload(page, "teach_masks", a=png())
    assert not page.error
    folder, arguments, files = taught(page, monkeypatch)
    assert arguments[arguments.index("--mask_dir") + 1] == str(folder / "masks")
    pictures, masks = ([name.partition("/")[2] for name in files if name.startswith(of)] for of in ("photo", "masks"))
    assert pictures == masks


def test_photographs_without_opacity_are_told_where_it_is_to_be_the_mask(runs):
    page = AppTest.from_function(teach, default_timeout=60).run()
    page.button_group("teach_counts").set_value("What is not transparent").run()
    assert "no alpha channel" in " ".join(caption.value for caption in page.caption)
    assert page.button("teach_button").disabled


def test_sizes_of_several_shapes_are_a_table(runs):
    page = AppTest.from_function(teach, default_timeout=60).run()
    assert not page.table
    page.toggle("teach_buckets").set_value(True).run()
    (table,) = page.table
    assert table.value.loc["64 × 64"].tolist() == [5, "0%", 1200]
