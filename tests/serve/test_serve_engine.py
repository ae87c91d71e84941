"""A real server, and a real `LLM`, with a calibration on CPU."""

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import gaudi_calib
from gaudi_calib.errors import FileError
from tests.support.calibrated import MODEL, Calibrated, calibrate_by_torch
from tests.support.processes import start_cli

pytest.importorskip("vllm")
openai = pytest.importorskip("openai")
psutil = pytest.importorskip("psutil")

pytestmark = [pytest.mark.torch, pytest.mark.vllm]

PROMPT = list(range(5, 30))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Calibrated:
    return calibrate_by_torch(MODEL, tmp_path_factory.mktemp("out"))


@contextmanager
def serve(run: Calibrated, log: Path) -> Iterator[str]:
    """Run `gaudi-calib serve` and yield its address; end it as a user does, with SIGINT."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["serve", "-m", run.model, "--quant-config", run.config("g3"), "--port", port, "--timeout", 300]
    words += ["--", "--host", "127.0.0.1", "--max-model-len", "256", "--served-model-name", "tiny"]
    with log.open("w") as file:
        server = start_cli(*words, stdout=file, stderr=file, start_new_session=True)
    try:
        _wait_until_healthy(server, f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(60)
        finally:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGKILL)


def _wait_until_healthy(server: subprocess.Popen, url: str, log: Path) -> None:
    deadline = time.monotonic() + 300
    while True:
        try:
            if urllib.request.urlopen(url, timeout=5).status == 200:
                return
        except (urllib.error.URLError, OSError):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)


def test_openai_clients_are_answered(run, tmp_path):
    """Chat, completion and streaming requests of the OpenAI client, through a server that says what it computes."""
    log = tmp_path / "serve.log"
    with serve(run, log) as address:
        client = openai.OpenAI(base_url=address, api_key="none")
        chat = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hello"}], max_tokens=4, temperature=0
        )
        assert chat.usage.completion_tokens == 4
        whole = client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=6, temperature=0, logprobs=1, extra_body={"ignore_eos": True}
        )
        streamed = client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=6, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
        chunks = [chunk.choices[0].text for chunk in streamed if chunk.choices]
        assert "".join(chunks) == whole.choices[0].text
        assert len(chunks) > 1
        assert len(whole.choices[0].logprobs.token_logprobs) == 6
    text = log.read_text()
    assert "no Gaudi here" in text and "gaudi_fp8" in text


def test_open_llm_answers_and_leaves_nothing(run):
    """The `LLM` computes in FP8; after an error in the block no process and no variable of it remains."""
    from vllm import SamplingParams, TokensPrompt

    mine = psutil.Process()
    before, variable = set(mine.children(recursive=True)), os.environ.get("QUANT_CONFIG")
    with (
        pytest.raises(ZeroDivisionError),
        gaudi_calib.open_llm(run.model, quant_config=run.config("g3"), max_model_len=256) as llm,
    ):
        assert os.environ["QUANT_CONFIG"] == str(run.config("g3"))
        assert llm.llm_engine.model_config.quantization == "gaudi_fp8"
        sampling = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        (answer,) = llm.generate([TokensPrompt(prompt_token_ids=PROMPT)], sampling, use_tqdm=False)
        assert len(answer.outputs[0].token_ids) == 4
        engine = set(mine.children(recursive=True)) - before
        raise ZeroDivisionError
    _, alive = psutil.wait_procs(
        [process for process in engine if "resource_tracker" not in _line(process)], timeout=30
    )
    assert alive == []
    assert os.environ.get("QUANT_CONFIG") == variable


def _line(process: "psutil.Process") -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def test_open_llm_checks_first(run):
    """A calibration that does not fit is refused without starting an engine."""
    with (
        pytest.raises(FileError, match="no files for 4 ranks"),
        gaudi_calib.open_llm(run.model, quant_config=run.config("g3"), tensor_parallel_size=4),
    ):
        pass
