#!/bin/sh
# Asks `medusa serve smollm2` with clients and suites that others wrote: openai for Node, langchain-openai, litellm, llm, llm-comply,
# lm-eval (the score of plain decoding must be the score of Medusa) and guidellm. Each gets an environment of its own, once.
#
#     integration/serving/run.sh [node] [clients] [comply] [lm-eval] [guidellm]      # default: all
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
environments=${ENVIRONMENTS:-$root/.integration}
port=${PORT:-8765}
url=http://127.0.0.1:$port
mkdir -p "$environments"
[ $# -gt 0 ] || set -- node clients comply lm-eval guidellm

environment() { # NAME PACKAGE...: a virtual environment
    if [ ! -x "$environments/$1/bin/python" ]; then
        python3 -m venv "$environments/$1"
        name=$1
        shift
        "$environments/$name/bin/pip" install --quiet --constraint "$root/constraints.txt" "$@"
    fi
}

serve() { # OPTION...: start a server and wait until it is ready
    "$python" -m medusa serve smollm2 --port "$port" --dtype float32 --slots 4 --capacity 1024 "$@" 2> "$environments/serve.log" &
    server=$!
    until curl --silent --fail "$url/ready"; do
        kill -0 $server || { cat "$environments/serve.log"; exit 1; }
        sleep 1
    done
}

stop() {
    kill $server
    wait $server || true
}

tokenizer() { # the model's, as a folder, for clients that count tokens
    "$python" -c "from medusa.checkpoints.named import load_tokenizer as load; load('smollm2').save_pretrained('$environments/tokenizer')"
}

score() { # NAME: what lm-eval says of the server that runs
    (cd "$here" && HF_HUB_OFFLINE=1 "$environments/lm-eval/bin/lm_eval" run --model local-completions \
        --model_args "model=smollm2,base_url=$url/v1/completions,tokenizer=$environments/tokenizer,tokenizer_backend=huggingface,\
tokenized_requests=False,num_concurrent=4" --include_path . --tasks capitals,generated) > "$environments/$1.out" 2>&1 || true
    grep "^|" "$environments/$1.out" | tee "$environments/$1.score"
}

trap 'kill $server 2> /dev/null || true' EXIT
serve
for client in "$@"; do
    case $client in
    node)
        mkdir -p "$environments/node"
        cp "$here/client.mjs" "$environments/node/"
        (cd "$environments/node" && npm install --silent --no-save openai && node client.mjs "$url/v1" smollm2) || true
        ;;
    clients)
        environment clients langchain-openai litellm llm
        "$environments/clients/bin/python" "$here/clients.py" "$url/v1" smollm2 || true
        ;;
    comply)
        environment comply llm-comply==0.5.0
        for format in openai-chat open-responses; do
            "$environments/comply/bin/llm-comply" --format $format --timeout 120 -u "$url/v1" -k none -m smollm2 || true
        done
        ;;
    guidellm)
        environment guidellm guidellm==0.8.1
        tokenizer
        HF_HUB_OFFLINE=1 "$environments/guidellm/bin/guidellm" run \
            --backend "kind=openai_http,target=$url,model=smollm2,request_format=/v1/completions" \
            --profile kind=concurrent,streams=4 --constraint kind=max_requests,count=12 \
            --tokenizer "kind=huggingface_auto,model=$environments/tokenizer" \
            --data kind=synthetic_text,prompt_tokens=64,output_tokens=32 \
            --output "kind=json,path=$environments/guidellm.json" --disable-progress || true
        ;;
    lm-eval)
        environment lm-eval "lm-eval[api]==0.4.13" torch transformers
        tokenizer
        score medusa
        stop
        serve --tree root
        score plain
        cmp "$environments/medusa.score" "$environments/plain.score" && echo "lm-eval: the scores of plain decoding and Medusa are equal"
        stop
        serve
        ;;
    esac
done
stop
