"""A gRPC server and a client that asks it for everything, with grpcio: `serve`, or `ask ADDRESS`."""

import sys
import threading
from concurrent import futures

import grpc


def echo(request, context):
    metadata = dict(context.invocation_metadata())
    context.set_trailing_metadata((("x-said", metadata.get("x-say", "")), ("x-region", metadata.get("portolan-region", ""))))
    return b"echo " + request


def count(request, _context):
    for i in range(int(request)):
        yield str(i).encode()


def join(requests, _context):
    return b"+".join(requests)


def chat(requests, _context):
    for request in requests:
        yield b"you said " + request


def fail(_request, context):
    context.abort(grpc.StatusCode.INVALID_ARGUMENT, "it is wrong: 100 % \u00fc")


def slow(_request, context):
    gone = threading.Event()
    context.add_callback(gone.set)
    gone.wait(60)
    return b"late"


def large(request, _context):
    return b"x" * int(request)


METHODS = {
    "Echo": grpc.unary_unary_rpc_method_handler(echo),
    "Count": grpc.unary_stream_rpc_method_handler(count),
    "Join": grpc.stream_unary_rpc_method_handler(join),
    "Chat": grpc.stream_stream_rpc_method_handler(chat),
    "Fail": grpc.unary_unary_rpc_method_handler(fail),
    "Slow": grpc.unary_unary_rpc_method_handler(slow),
    "Large": grpc.unary_unary_rpc_method_handler(large),
}


def serve():
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=16))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Test", METHODS),))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    server.start()
    sys.stdin.read()  # until whoever started it is gone
    server.stop(0)


def status(call):
    try:
        call()
    except grpc.RpcError as error:
        return error.code(), error.details()
    return None


def ask(address):
    options = [("grpc.max_receive_message_length", 64 << 20)]
    channel = grpc.insecure_channel(address, options)
    echo = channel.unary_unary("/test.Test/Echo")
    answer, call = echo.with_call(b"hello", metadata=(("x-say", "again"),), timeout=30)
    assert answer == b"echo hello", answer
    trailers = dict(call.trailing_metadata())
    assert trailers["x-said"] == "again" and trailers["x-region"] == "a", trailers
    assert echo(b"", timeout=30) == b"echo "

    numbers = list(channel.unary_stream("/test.Test/Count")(b"1000", timeout=30))
    assert numbers == [str(i).encode() for i in range(1000)], len(numbers)

    parts = [b"%d" % i for i in range(200)]
    assert channel.stream_unary("/test.Test/Join")(iter(parts), timeout=30) == b"+".join(parts)

    # Each message waits for the answer to the one before: nothing may hold them back.
    turn = threading.Semaphore(1)

    def messages():
        for i in range(50):
            turn.acquire()
            yield b"%d" % i

    heard = []
    for answer in channel.stream_stream("/test.Test/Chat")(messages(), timeout=60):
        heard.append(answer)
        turn.release()
    assert heard == [b"you said %d" % i for i in range(50)], heard

    wrong = status(lambda: channel.unary_unary("/test.Test/Fail")(b"", timeout=30))
    assert wrong == (grpc.StatusCode.INVALID_ARGUMENT, "it is wrong: 100 % \u00fc"), wrong
    unknown = status(lambda: channel.unary_unary("/test.Test/Nothing")(b"", timeout=30))
    assert unknown[0] == grpc.StatusCode.UNIMPLEMENTED, unknown
    late = status(lambda: channel.unary_unary("/test.Test/Slow")(b"", timeout=0.3))
    assert late[0] == grpc.StatusCode.DEADLINE_EXCEEDED, late
    cancelled = channel.unary_unary("/test.Test/Slow").future(b"")
    cancelled.cancel()
    assert cancelled.cancelled()

    assert len(channel.unary_unary("/test.Test/Large")(b"8000000", timeout=60)) == 8_000_000
    upload = b"y" * 3_000_000
    assert echo(upload, timeout=60) == b"echo " + upload

    # Many at once, on one connection.
    calls = [echo.future(b"%d" % i, timeout=60) for i in range(300)]
    assert [call.result() for call in calls] == [b"echo %d" % i for i in range(300)]
    print("all of it")


if __name__ == "__main__":
    serve() if sys.argv[1] == "serve" else ask(sys.argv[2])
