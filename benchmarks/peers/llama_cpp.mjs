// llama.cpp behind node-llama-cpp: a request of token ids a line on stdin, its greedy continuation and times on stdout.
//
//     node llama_cpp.mjs model.gguf 1,2     # thread counts; started by llama_cpp.py beside it
import {createInterface} from "node:readline";
import {getLlama} from "node-llama-cpp";

const [path, counts] = process.argv.slice(2);
const llama = await getLlama({gpu: false, build: "never", logLevel: "error", maxThreads: 0});
const model = await llama.loadModel({modelPath: path});
const sequences = {};
for (const threads of counts.split(",").map(Number)) {
    const context = await model.createContext({contextSize: 2048, threads, batchSize: 512});
    sequences[threads] = context.getSequence();
}
console.log(JSON.stringify({ready: true}));
for await (const line of createInterface({input: process.stdin})) {
    const {threads, ids, budget} = JSON.parse(line);
    const sequence = sequences[threads], tokens = [];
    await sequence.clearHistory();
    const began = performance.now();
    let first = 0;
    for await (const token of sequence.evaluate(ids, {temperature: 0, yieldEogToken: true})) {
        tokens.push(token);
        if (tokens.length === 1) first = performance.now() - began;
        if (tokens.length >= budget) break;
    }
    const all = performance.now() - began;
    console.log(JSON.stringify({tokens, first_s: first / 1000, decode_s: (all - first) / 1000}));
}
process.exit(0);
