// llama.cpp as a decoder of benchmarks/peers.py: reads one request a line, {ids, limit, temperature, seed}, and answers each with
// {tokens, first, seconds}, seconds measured here. Arguments: the GGUF file, the number of threads, "plain" or "lookup".
import readline from "node:readline";
import {getLlama, InputLookupTokenPredictor, LlamaLogLevel} from "node-llama-cpp";

const [modelPath, threads, mode] = process.argv.slice(2);
const llama = await getLlama({gpu: false, maxThreads: Number(threads), logLevel: LlamaLogLevel.error, build: "never"});
const model = await llama.loadModel({modelPath});
const context = await model.createContext({contextSize: 2048, threads: Number(threads)});
const options = mode === "lookup" ? {tokenPredictor: new InputLookupTokenPredictor()} : {};
const sequence = context.getSequence(options);
console.log(JSON.stringify({ready: true, cpu: llama.cpuMathCores}));

for await (const line of readline.createInterface({input: process.stdin})) {
    const {ids, limit, temperature, seed} = JSON.parse(line);
    await sequence.clearHistory();
    const tokens = [];
    let first = 0;
    const start = performance.now();
    for await (const token of sequence.evaluate(ids, {temperature, seed, topK: 0, topP: 1, minP: 0, yieldEogToken: true})) {
        if (tokens.length === 0) first = (performance.now() - start) / 1000;
        tokens.push(token);
        if (tokens.length >= limit || model.isEogToken(token)) break;
    }
    console.log(JSON.stringify({tokens, first, seconds: (performance.now() - start) / 1000}));
}
