// BullMQ on the Redis at PORT: adds N no-op jobs from C concurrent callers, then
// processes them with one Worker of concurrency C. Prints both rates.
// node bullmq.mjs PORT N C, run from the folder that has node_modules.
import {createRequire} from 'node:module';
const require = createRequire(process.cwd() + '/');
const {Queue, Worker} = require('bullmq');

const [port, count, concurrency] = process.argv.slice(2).map(Number);
const connection = {host: '127.0.0.1', port};
const queue = new Queue('bench', {connection});
await queue.obliterate({force: true}).catch(() => {});
const body = 'x'.repeat(240);
const seconds = (since) => Number(process.hrtime.bigint() - since) / 1e9;

let start = process.hrtime.bigint();
let next = 0;
await Promise.all(Array.from({length: concurrency}, async () => {
  while (next++ < count) await queue.add('noop', {body});
}));
const add = count / seconds(start);

start = process.hrtime.bigint();
let done = 0;
await new Promise((resolve) => new Worker('bench', async () => {
  if (++done === count) resolve();
}, {connection, concurrency}));
const run = count / seconds(start);
console.log(`add=${add.toFixed(0)} process=${run.toFixed(0)} ` +
            `both=${(1 / (1 / add + 1 / run)).toFixed(0)}`);
process.exit(0);
