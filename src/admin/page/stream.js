// Streams of events that come back by themselves, and say why when they cannot.

const LONGEST = 30_000;

/** Why a stream is refused; nothing if it is not, or if nobody answers. */
async function refusal(path) {
  const stop = new AbortController();
  try {
    const answer = await fetch(path, { signal: stop.signal });
    return answer.ok ? '' : (await answer.text()).trim() || `status ${answer.status}`;
  } catch {
    return '';
  } finally {
    stop.abort();
  }
}

/** Follows the stream at `path()`. `trouble` hears what is wrong: a text that the process answered, `lost`, or nothing. */
export function follow(path, handlers, trouble) {
  let source;
  let timer;
  let pause = 1000;

  function close() {
    clearTimeout(timer);
    source?.close();
    source = undefined;
  }

  function open() {
    close();
    const mine = new EventSource(path());
    source = mine;
    mine.addEventListener('open', () => {
      pause = 1000;
      trouble('');
    });
    for (const [name, hear] of Object.entries(handlers)) mine.addEventListener(name, (event) => hear(JSON.parse(event.data)));
    mine.addEventListener('error', async () => {
      if (mine !== source) return;
      // The browser itself tries again, but not after an answer that is no stream.
      if (mine.readyState !== EventSource.CLOSED) {
        trouble('lost');
        return;
      }
      const why = await refusal(path());
      if (mine !== source) return;
      trouble(why || 'lost');
      timer = setTimeout(open, pause);
      pause = Math.min(pause * 2, LONGEST);
    });
  }

  return { open, close };
}
