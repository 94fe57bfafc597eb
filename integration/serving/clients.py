"""Python clients that are not OpenAI's own: langchain-openai, litellm and llm.

python integration/serving/clients.py http://127.0.0.1:8000/v1 smollm2
"""

import importlib.metadata
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # otherwise it waits for the network
QUESTION = "What is the capital of France?"


def langchain(url: str, model: str) -> None:
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(base_url=url, model=model, api_key="none", temperature=0, max_tokens=40)
    whole = chat.invoke(QUESTION)
    assert "Paris" in whole.content and whole.usage_metadata["output_tokens"] > 0
    assert "".join(chunk.content for chunk in chat.stream(QUESTION)) == whole.content

    @tool
    def population(city: str) -> int:
        """The number of people in a city."""
        return 0

    called = chat.bind_tools([population], tool_choice="required").invoke("How many people live in Paris?")
    assert [call["name"] for call in called.tool_calls] == ["population"], called


def litellm(url: str, model: str) -> None:
    import litellm

    settings = {"model": f"openai/{model}", "api_base": url, "api_key": "none", "temperature": 0, "max_tokens": 40}
    messages = [{"role": "user", "content": QUESTION}]
    whole = litellm.completion(messages=messages, **settings).choices[0].message.content
    parts = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(messages=messages, stream=True, **settings)]
    assert "Paris" in whole and "".join(parts) == whole


def llm(url: str, model: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = f"- model_id: medusa\n  model_name: {model}\n  api_base: {url}\n"
        (Path(folder) / "extra-openai-models.yaml").write_text(config)
        command = [sys.executable, "-m", "llm", "-m", "medusa", "-o", "temperature", "0", "-o", "max_tokens", "40", QUESTION]
        environment = os.environ | {"LLM_USER_PATH": folder, "OPENAI_API_KEY": "none"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0 and "Paris" in done.stdout, done


def main() -> None:
    failed = False
    for check, package in ((langchain, "langchain-openai"), (litellm, "litellm"), (llm, "llm")):
        try:
            check(*sys.argv[1:3])
            print(f"{package} {importlib.metadata.version(package)}: ok")
        except Exception as error:  # the others are still to be tried
            failed = True
            print(f"{package}: WRONG: {type(error).__name__} {error}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
