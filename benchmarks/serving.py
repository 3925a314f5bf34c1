"""The endpoint on the clock: requests a second, and the time to the first block, with so many clients at once, beside one by one.

    OMP_NUM_THREADS=1 python benchmarks/serving.py                        # the embedded model
    python benchmarks/serving.py output/tiny/sft_model --requests 256

Clients are threads in the server's process, so their time is in the figures. Every client asks for its next answer when it has one. Prompts are
those of the embedded tasks; every answer is compared with that of a request alone.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import torch
import uvicorn

from llm_diffusion import DiffusionInference
from llm_diffusion.data.tiny import tiny_dataset
from llm_diffusion.serving.server import build_app, listen


def ask(client: openai.OpenAI, question: str) -> tuple[str, float]:
    """The answer, streamed, and seconds until its first text."""
    began, first, text = time.perf_counter(), None, ""
    messages = [{"role": "user", "content": question}]
    for chunk in client.chat.completions.create(model="model", messages=messages, stream=True):
        piece = chunk.choices[0].delta.content or ""
        first = first or (time.perf_counter() - began if piece else None)
        text += piece
    return text, first or time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tiny")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--max-new-tokens", type=int, default=48)
    options = parser.parse_args()
    inference = DiffusionInference.from_pretrained(options.model, max_new_tokens=options.max_new_tokens)
    questions = [row["messages"][0]["content"] for row in tiny_dataset(options.requests, seed=1)]
    app = build_app(inference, "model", batch_size=max(options.clients))
    print(
        f"`{options.model}`, {options.requests} requests, at most {options.max_new_tokens} tokens, {torch.get_num_threads()} thread(s).\n"
    )
    print(
        "| clients | requests/s | times one | first block, s (median) | answer, s (median) | batches | same answers |"
    )
    print("|--:|--:|--:|--:|--:|--:|--:|")
    with listen("127.0.0.1", 0) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        url, alone, base = f"http://127.0.0.1:{listening.getsockname()[1]}/v1", None, None
        with openai.OpenAI(base_url=url, api_key="none", timeout=httpx.Timeout(600)) as client:
            ask(client, questions[0])  # warms up
            for clients in options.clients:
                batches, began = app.state.engine.batches, time.perf_counter()

                def timed(question: str) -> tuple[str, float, float]:
                    started = time.perf_counter()
                    return (*ask(client, question), time.perf_counter() - started)

                with ThreadPoolExecutor(clients) as pool:
                    texts, firsts, whole = zip(*pool.map(timed, questions), strict=True)
                rate = len(questions) / (time.perf_counter() - began)
                alone, base = alone or texts, base or rate
                same = sum(map(str.__eq__, texts, alone))
                figures = (
                    f"{rate:.2f} | {rate / base:.2f} | {statistics.median(firsts):.2f} | {statistics.median(whole):.2f}"
                )
                print(
                    f"| {clients} | {figures} | {app.state.engine.batches - batches} | {same} of {len(questions)} |",
                    flush=True,
                )
        server.should_exit = True
        thread.join()


if __name__ == "__main__":
    main()
