"""Inputs that a seed draws: whatever a user, a disk or another program brings, a run keeps its promises.

It ends, with exit code 0, 1 or 2. A failure's last line begins with the script's name and names the flag, the
file or the row, without a traceback. After code 2 nothing was written. Code 0 means that the result is right.

    FUZZ_CASES=200 FUZZ_SEED=7 python -m pytest tests/test_fuzz.py -k checkpoint      many inputs of one kind

Left out: flipped bits in a checkpoint's tensors, which nothing tells from training.
"""

import http.server
import json
import math
import os
import random
import shutil
import threading
from pathlib import Path

import grpo_models
import pytest
from fuzz_inputs import DRAWS, GRPO, LLM, STEPS, flags_for, losses
from helpers import make_hf_model, make_tokenizer, run_script, write_gsm8k_like
from quick_runs import quick_run, quick_runs

SEED, CASES = int(os.environ.get("FUZZ_SEED", 1)), int(os.environ.get("FUZZ_CASES", 4))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data, models, a log of rollouts, and the runs that go on: of 4 steps, and of 6."""
    folder = tmp_path_factory.mktemp("fuzz")
    make_tokenizer(folder / "tokenizer", chat_template="chatml_generation")
    make_hf_model("llama", folder / "llama")
    write_gsm8k_like(folder / "rows.jsonl", 30)
    grpo_models.make_policy(folder / "policy")
    grpo_models.make_questions(folder / "questions")
    for steps in (4, 6):
        quick_run([*flags_for(LLM, folder, folder), *STEPS, "--max-steps", steps, "--checkpoint-dir",
                   folder / str(steps)])
    quick_run(flags_for(GRPO, folder, folder), script=GRPO.__file__)
    return folder


def problems_of(case, folder):
    """Runs the case; yields the promises that it does not keep."""
    script, name = Path(case.script.__file__), Path(case.script.__file__).name
    if case.before:
        start = folder / "start.py"
        start.write_text(f"import os, runpy, sys\nsys.argv[0] = {str(script)!r}\n{case.before}\n"
                         "runpy.run_path(sys.argv[0], run_name='__main__')\n")
    found_before = set(folder.iterdir())
    try:
        [result] = quick_runs(case.args, [case.env], folder, 60, start if case.before else script)
    except AssertionError as error:
        yield f"no end\n{str(error)[-2000:]}"
        return
    end = "\n".join(line[:300] for line in result.stderr.splitlines()[-12:])
    errors = [line for line in result.stderr.splitlines() if line.startswith(f"{name}: error: ")]
    if result.returncode not in (0, 1, 2) or "Traceback" in result.stderr:
        yield f"exit code {result.returncode}, or a traceback\n{end}"
    if result.returncode and not (errors and result.stderr.splitlines()[-1].startswith(f"{name}: ")):
        yield f"the last line is not the script's\n{end}"
    elif result.returncode and not any(word in line for line in errors for word in case.names):
        yield f"none of {case.names} is named\n{end}"
    if result.returncode == 2 and set(folder.iterdir()) != found_before:
        yield "something was written"
    if case.must_fail is not None and case.must_fail != bool(result.returncode):
        yield f"exit code {result.returncode}\n{end}"
    if result.returncode == 0:
        found = next((losses(path.parent) for path in folder.rglob("metrics.jsonl")), {})
        expected = case.rows or found
        if not all(map(math.isfinite, found.values())) or not found.items() <= expected.items():
            yield f"losses {found} in place of {case.rows}"
        if max(found, default=0) != max(expected, default=0) or not (found or "train-steps=0" in case.what):
            yield f"steps {list(found)}"


@pytest.mark.parametrize("draw", DRAWS, ids=lambda draw: draw.__name__)
def test_promises(draw, place, tmp_path):
    faults = []
    for number in range(CASES):
        folder = tmp_path / str(number)
        folder.mkdir()
        case = draw(random.Random(f"{SEED} {draw.__name__} {number}"), place, folder)
        faults += [f"FUZZ_SEED={SEED}, case {number}: {case.what}\n{problem}"
                   for problem in problems_of(case, folder)]
        shutil.rmtree(folder)
    assert not faults, f"{len(faults)} faults\n" + "\n\n".join(faults)


@pytest.mark.slow
def test_another_locale_and_no_docstrings(place, tmp_path):
    env = {"PYTHONOPTIMIZE": "2", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    run_script([*flags_for(LLM, place, tmp_path)], cwd=tmp_path, env=env)
    assert set(losses(tmp_path / "run")) == {1, 2}


LIKE_VLLM = {"choices": [{"finish_reason": "stop", "token_ids": [5, 6], "prompt_token_ids": [1, 2],
                          "logprobs": {"token_logprobs": [-0.5, -0.1]}}]}
STRANGE = [None, "", 5, -1, math.nan, "7", [], {}, [5], [None, None], ["5", "6"], [-1, 2], [5, 6, 7],
           [-0.5, math.nan], {"token_logprobs": None}, "abort"]
BODIES = [b"", b"<html>It works</html>", b"[]", b"{}", b"null", b"\xff\xfe", b'{"choices": ', b"[" * 100_000,
          b'{"data": []}', b'{"data": [5]}', b'{"results": 5}', b'{"results": [5]}']


class FalseServer(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.server.answer)

    do_GET, log_message = do_POST, lambda *_: None


def test_a_server_that_is_no_vllm():
    """Every answer is what it should be, or a UserError that names the server."""
    false = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FalseServer)
    threading.Thread(target=false.serve_forever, daemon=True).start()
    server = GRPO.Server(*false.server_address, 1.0)
    calls = [lambda: GRPO.complete(server, [1, 2], 1, GRPO.Sampling(1.0, 4, [6])),
             lambda: GRPO.rpc(server, "weights_version")]
    for number in range(50 * CASES):
        rng, answer = random.Random(f"{SEED} server {number}"), json.loads(json.dumps(LIKE_VLLM))
        choice = answer["choices"][0]
        part = rng.choice([answer, choice, choice, choice, choice["logprobs"]])
        part[rng.choice(list(part))] = rng.choice(STRANGE)
        false.answer = rng.choice([json.dumps(answer).encode(), rng.choice(BODIES)])
        try:
            taken = rng.choice(calls)()
        except GRPO.UserError as error:
            assert server.address in str(error), (SEED, number, false.answer, error)
        else:
            [completion] = taken
            GRPO.check_tokens(completion.ids, completion.logprobs)
    false.shutdown()
