// Chat with a running gateway from JavaScript: Node 18 or newer, Deno, Bun, or a page of a browser (see --cors-allow-origin).
//
//     node fetch.mjs http://127.0.0.1:3000 "What is the capital of France?"

const [url, question] = process.argv.slice(2);

const response = await fetch(`${url}/v1/chat/completions`, {
  method: "POST",
  headers: { "content-type": "application/json", authorization: `Bearer ${process.env.API_KEY ?? "none"}` },
  body: JSON.stringify({
    messages: [{ role: "user", content: question }],
    max_tokens: 60,
    temperature: 0,
    stream: true,
  }),
});
if (!response.ok) throw new Error(`${response.status}: ${await response.text()}`);

let rest = "";
for await (const piece of response.body.pipeThrough(new TextDecoderStream())) {
  const lines = (rest + piece).split("\n");
  rest = lines.pop(); // the last line may go on in the next piece
  for (const line of lines) {
    if (!line.startsWith("data:") || line.includes("[DONE]")) continue;
    const chunk = JSON.parse(line.slice(5));
    if (chunk.error) throw new Error(chunk.error.message ?? chunk.error);
    process.stdout.write(chunk.choices[0]?.delta.content ?? "");
  }
}
console.log();
