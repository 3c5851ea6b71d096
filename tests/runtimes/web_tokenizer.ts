// Prompt ids and token bytes as the page computes them: reads one JSON document from stdin, prints one.
import { readFileSync } from "node:fs";

import { promptIds } from "../../runtimes/web/src/engine/prompt";
import { sectionTokenizer } from "../../runtimes/web/src/engine/tokenizer";

const given = JSON.parse(readFileSync(0, "utf-8"));
const tokenizer = sectionTokenizer(given.tokenizer, given.config);
const ids = given.questions.map((question: string) => promptIds(question, given.template, tokenizer, true));
const bytes = given.ids.map((id: number) => Buffer.from(tokenizer.bytes(id)).toString("hex"));
console.log(JSON.stringify({ ids, bytes }));
