package intercept

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// soon ends a context that a test expects not to need.
func soon(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// gated returns a memory whose operations of one kind wait: each says so on
// entered and goes on when release is closed.
func gated(op string) (dev *memory, entered chan int64, release chan struct{}) {
	dev, entered, release = newMemory(8<<20), make(chan int64, 10_000), make(chan struct{})
	dev.before = func(o string, off, n int64) error {
		if o == op {
			entered <- off
			<-release
		}
		return nil
	}
	return dev, entered, release
}

// TestShutdown holds a request in the device while the server is told to stop:
// it is answered, one that comes meanwhile is refused, idle connections and
// handshakes end at once.
func TestShutdown(t *testing.T) {
	for _, st := range styles {
		t.Run(st.String(), func(t *testing.T) {
			dev, entered, release := gated("write")
			s, addr := startServer(t, Options{Exports: newShelf(map[string]Device{"disk": dev})})
			busy, idle, handshaking := connect(t, addr, st, "disk"), connect(t, addr, st, "disk"), dial(t, addr)

			write := busy.start(request{typ: NBD_CMD_WRITE, n: 4096}, make([]byte, 4096))
			<-entered
			stopped := make(chan error)
			go func() { stopped <- s.Shutdown(soon(t)) }()
			<-idle.ended
			handshaking.wantEnd()
			busy.want(request{typ: NBD_CMD_READ, n: 4096}, nil, NBD_ESHUTDOWN)
			busy.want(request{typ: NBD_CMD_WRITE, n: 4096}, make([]byte, 4096), NBD_ESHUTDOWN)
			busy.want(request{typ: NBD_CMD_FLUSH}, nil, NBD_ESHUTDOWN)
			select {
			case err := <-stopped:
				t.Fatalf("Shutdown returned %v while a request was in the device", err)
			default:
			}
			close(release)
			if <-write.done; write.err != nil || write.errno != 0 {
				t.Errorf("write in flight\n got %d, %v\nwant success", write.errno, write.err)
			}
			if err := <-stopped; err != nil {
				t.Errorf("Shutdown: %v", err)
			}
			if _, err := net.Dial(addr.Network(), addr.String()); err == nil {
				t.Error("a client could connect after Shutdown")
			}
		})
	}
}

// TestShutdownDuringHandshake finds a client whose option is being served and
// whose next one is on its way.
func TestShutdownDuringHandshake(t *testing.T) {
	exports := newShelf(map[string]Device{"disk": newMemory(4096)})
	opening, proceed := make(chan struct{}), make(chan struct{})
	exports.opening = func(string) error { close(opening); <-proceed; return nil }
	s, addr := startServer(t, Options{Exports: exports})
	c := dial(t, addr)
	data := infoData("disk")
	c.sendOption(NBD_OPT_INFO, len(data), data)
	<-opening
	c.sendOption(NBD_OPT_LIST, 0, nil)
	stopped := make(chan error)
	go func() { stopped <- s.Shutdown(soon(t)) }()
	for !s.stopping.Load() {
		time.Sleep(time.Millisecond)
	}
	close(proceed)
	c.optionReplies(NBD_OPT_INFO)
	if got := c.optionReplies(NBD_OPT_LIST)[0].typ; got != NBD_REP_ERR_SHUTDOWN {
		t.Errorf("reply to LIST\n got %#x\nwant %#x", got, NBD_REP_ERR_SHUTDOWN)
	}
	c.wantEnd()
	if err := <-stopped; err != nil {
		t.Errorf("Shutdown: %v", err)
	}
}

// TestShutdownCutsOff stops with a device that hangs: Shutdown ends with ctx,
// the export is released when the device comes back.
func TestShutdownCutsOff(t *testing.T) {
	dev, entered, release := gated("flush")
	exports := newShelf(map[string]Device{"disk": dev})
	s, addr := startServer(t, Options{Exports: exports})
	c := connect(t, addr, structured, "disk")
	x := c.start(request{typ: NBD_CMD_FLUSH}, nil)
	<-entered
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := s.Shutdown(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("Shutdown\n got %v\nwant %v", err, context.Canceled)
	}
	if <-x.done; x.err == nil {
		t.Errorf("the request was answered with %d", x.errno)
	}
	close(release)
	exports.waitReleased("disk")
}

// TestShutdownWithDeadPeer stops a server whose client has stopped reading, so
// that a reply can never be written: Shutdown ends with ctx all the same, and
// then the connection has no more hold on the export.
func TestShutdownWithDeadPeer(t *testing.T) {
	dev := newMemory(8 << 20)
	dev.data[0] = 1 // not a hole
	exports := newShelf(map[string]Device{"disk": dev})
	s, addr := startServer(t, Options{Exports: exports})
	flood(t, silent(t, addr), (&client{}).appendRequest(nil, request{typ: NBD_CMD_READ, flags: NBD_CMD_FLAG_DF, n: 4 << 20}))
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	if err := s.Shutdown(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Shutdown\n got %v\nwant %v", err, context.DeadlineExceeded)
	}
	exports.waitReleased("disk")
}

// TestDisconnectRequest sends DISC while a request is in the device: it is
// answered, then the connection ends.
func TestDisconnectRequest(t *testing.T) {
	for _, st := range styles {
		dev, entered, release := gated("read")
		c := connect(t, serveDevice(t, dev), st, "disk")
		x := c.start(request{typ: NBD_CMD_READ, n: 4096}, nil)
		<-entered
		c.write(c.appendRequest(nil, request{typ: NBD_CMD_DISC}))
		select {
		case <-c.ended:
			t.Errorf("style %v: the connection ended with a request in flight", st)
		case <-time.After(20 * time.Millisecond):
		}
		close(release)
		if <-x.done; x.err != nil || x.errno != 0 {
			t.Errorf("style %v: request in flight\n got %d, %v\nwant success", st, x.errno, x.err)
		}
		<-c.ended
	}
}

// TestGone destroys an export while its client has a request in it and more
// come: these are refused, and the export is released when the device is empty
// although the client stays.
func TestGone(t *testing.T) {
	dev, entered, release := gated("read")
	exports := newShelf(map[string]Device{"disk": dev, "other": newMemory(4096)})
	s, addr := startServer(t, Options{Exports: exports})
	busy, idle := connect(t, addr, structured, "disk"), connect(t, addr, structured, "disk")
	other := connect(t, addr, structured, "other")

	x := busy.start(request{typ: NBD_CMD_READ, n: 4096}, nil)
	<-entered
	for len(s.Clients()) != 3 { // a client is told before it is counted
		time.Sleep(time.Millisecond)
	}
	close(exports.gone["disk"])
	for exports.users("disk") != 1 { // idle's use ends by itself
		time.Sleep(time.Millisecond)
	}
	for _, c := range []*client{busy, idle} {
		c.want(request{typ: NBD_CMD_WRITE, n: 100 << 10}, make([]byte, 100<<10), NBD_ESHUTDOWN)
		c.want(request{typ: NBD_CMD_FLUSH}, nil, NBD_ESHUTDOWN)
	}
	if got := exports.users("disk"); got != 1 {
		t.Errorf("uses while a request is in the device\n got %d\nwant 1", got)
	}
	close(release)
	if <-x.done; x.err != nil || x.errno != 0 {
		t.Errorf("read in flight\n got %d, %v\nwant success", x.errno, x.err)
	}
	exports.waitReleased("disk")
	if got, want := s.Clients(), []Client{{"other", s.Clients()[0].Peer}}; !slices.Equal(got, want) {
		t.Errorf("clients\n got %v\nwant %v", got, want)
	}
	other.want(request{typ: NBD_CMD_READ, n: 4096}, nil, 0)
	idle.disconnect()
}

// TestDisconnect drops the clients of one export and waits for their requests.
func TestDisconnect(t *testing.T) {
	dev, entered, release := gated("write")
	exports := newShelf(map[string]Device{"disk": dev, "other": newMemory(4096)})
	s, addr := startServer(t, Options{Exports: exports})
	a, b, other := connect(t, addr, simple, "disk"), connect(t, addr, extended, "disk"), connect(t, addr, simple, "other")
	x := a.start(request{typ: NBD_CMD_WRITE, n: 4096}, make([]byte, 4096))
	<-entered

	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := s.Disconnect(ctx, "disk"); !errors.Is(err, context.Canceled) {
		t.Errorf("Disconnect with a write in the device\n got %v\nwant %v", err, context.Canceled)
	}
	<-a.ended
	<-b.ended
	if <-x.done; x.err == nil {
		t.Error("the write was answered")
	}
	close(release)
	if err := s.Disconnect(soon(t), "disk"); err != nil {
		t.Errorf("Disconnect: %v", err)
	}
	if got := exports.users("disk"); got != 0 {
		t.Errorf("uses after Disconnect\n got %d\nwant 0", got)
	}
	other.want(request{typ: NBD_CMD_READ, n: 4096}, nil, 0)
	connect(t, addr, simple, "disk").want(request{typ: NBD_CMD_READ, n: 4096}, nil, 0)
}

// TestDisconnectWhileOpening calls Disconnect after a client's Open and before
// its session: the client must not slip through, nor one of another export suffer.
func TestDisconnectWhileOpening(t *testing.T) {
	for _, tc := range []struct {
		dropped string
		want    bool // the client is served
	}{{"disk", false}, {"other", true}} {
		t.Run(tc.dropped, func(t *testing.T) {
			exports := newShelf(map[string]Device{"disk": newMemory(4096), "other": newMemory(4096)})
			opening, proceed := make(chan struct{}), make(chan struct{})
			exports.opening = func(string) error { close(opening); <-proceed; return nil }
			s, addr := startServer(t, Options{Exports: exports})
			c := dial(t, addr)
			data := infoData("disk")
			c.sendOption(NBD_OPT_GO, len(data), data)
			<-opening
			if err := s.Disconnect(soon(t), tc.dropped); err != nil {
				t.Errorf("Disconnect: %v", err)
			}
			close(proceed)
			c.optionReplies(NBD_OPT_GO)
			if !tc.want {
				c.wantEnd()
				return
			}
			go c.receive()
			c.want(request{typ: NBD_CMD_READ, n: 4096}, nil, 0)
		})
	}
}

// TestHungDevice hangs one export with as many requests as it takes; other
// exports do not notice.
func TestHungDevice(t *testing.T) {
	hung, entered, release := gated("read")
	exports := newShelf(map[string]Device{"disk": hung, "other": newMemory(64 << 20)})
	_, addr := startServer(t, Options{Exports: exports, MemoryBudget: 36 << 20})
	var stuck []*exchange
	for range 8 {
		c := connect(t, addr, structured, "disk")
		for range 40 { // more than the workers and the budget
			stuck = append(stuck, c.start(request{typ: NBD_CMD_READ, n: 512 << 10}, nil))
		}
	}
	for range 8 {
		<-entered
	}
	for _, st := range styles {
		c := connect(t, addr, st, "other")
		c.want(request{typ: NBD_CMD_READ, n: 8 << 20}, nil, 0)
		c.want(request{typ: NBD_CMD_WRITE, n: 8 << 20}, make([]byte, 8<<20), 0)
		c.disconnect()
	}
	close(release)
	for _, x := range stuck {
		if <-x.done; x.err != nil || x.errno != 0 {
			t.Fatalf("request that hung for a while: %d, %v", x.errno, x.err)
		}
	}
}

// TestFastBesideSlow has a request that hangs and one that does not on the same
// connection: the second is answered.
func TestFastBesideSlow(t *testing.T) {
	dev, entered, release := gated("flush")
	c := connect(t, serveDevice(t, &tryMemory{memory: dev}), structured, "disk")
	x := c.start(request{typ: NBD_CMD_FLUSH}, nil)
	<-entered
	for range 10 {
		c.want(request{typ: NBD_CMD_READ, n: 4096}, nil, 0)
		c.want(request{typ: NBD_CMD_WRITE, n: 4096}, make([]byte, 4096), 0)
	}
	close(release)
	<-x.done
}

// TestManySlow has as many requests hang on one connection as its client may
// have in flight: all of them are in the device, and one that does not hang is
// answered.
func TestManySlow(t *testing.T) {
	for _, n := range []int{64, 128} { // libnbd's tools, Linux
		dev, entered, release := gated("write")
		c := connect(t, serveDevice(t, dev), structured, "disk")
		var stuck []*exchange
		for range n {
			stuck = append(stuck, c.start(request{typ: NBD_CMD_WRITE, n: 4096}, make([]byte, 4096)))
		}
		for range n {
			<-entered
		}
		c.want(request{typ: NBD_CMD_READ, n: 4096}, nil, 0)
		c.want(request{typ: NBD_CMD_FLUSH}, nil, 0)
		close(release)
		for _, x := range stuck {
			if <-x.done; x.err != nil || x.errno != 0 {
				t.Fatalf("request that hung for a while: %d, %v", x.errno, x.err)
			}
		}
	}
}

func TestMaxConns(t *testing.T) {
	_, addr := startServer(t, Options{Exports: newShelf(map[string]Device{"disk": newMemory(4096)}), MaxConns: 2})
	a := connect(t, addr, simple, "disk")
	a.want(request{typ: NBD_CMD_READ, n: 4096}, nil, 0) // so that it is not in its handshake
	connect(t, addr, simple, "disk").want(request{typ: NBD_CMD_READ, n: 4096}, nil, 0)
	dialRaw(t, addr).wantEnd()
	a.disconnect()
	for { // until the server has noticed
		c := dialRaw(t, addr)
		if _, err := c.in.Peek(1); err == nil {
			return
		}
	}
}

// TestSilentStrangers fills a server with connections that never end their handshake:
// they do not keep out a client, nor cut off one that is served.
func TestSilentStrangers(t *testing.T) {
	_, addr := startServer(t, Options{Exports: newShelf(map[string]Device{"disk": newMemory(4096)}), MaxConns: 4})
	served := connect(t, addr, simple, "disk")
	served.want(request{typ: NBD_CMD_READ, n: 4096}, nil, 0)
	var strangers []*client
	for range 20 {
		strangers = append(strangers, dialRaw(t, addr))
	}
	connect(t, addr, simple, "disk").want(request{typ: NBD_CMD_READ, n: 4096}, nil, 0)
	served.want(request{typ: NBD_CMD_READ, n: 4096}, nil, 0)
	io.Copy(io.Discard, strangers[0].conn) // ends: perhaps it was greeted, perhaps not
}

// TestSlowTaker checks that a client which takes its replies slowly, but does, is not
// held to be idle.
func TestSlowTaker(t *testing.T) {
	const size = 8 << 20
	dev := newMemory(size)
	rand.NewChaCha8([32]byte{}).Read(dev.data)
	_, addr := startServer(t, Options{Exports: newShelf(map[string]Device{"disk": dev}), IdleTimeout: 2 * time.Second})
	c := dial(t, addr)
	c.wantFinal(NBD_OPT_GO, infoData("disk"), NBD_REP_ACK)
	c.write(c.appendRequest(nil, request{typ: NBD_CMD_READ, n: size}))
	c.conn.SetReadDeadline(time.Now().Add(time.Minute))
	c.in = bufio.NewReaderSize(c.conn, 16)
	p := make([]byte, 64<<10)
	for n := 0; n < simpleReplySize+size; {
		m, err := c.in.Read(p)
		if n += m; err != nil {
			t.Fatalf("after %d bytes: %v", n, err)
		}
		time.Sleep(time.Duration(m) * time.Second / (3 << 20)) // 3 MiB a second
	}
}

func TestHandshakeTimeout(t *testing.T) {
	_, addr := startServer(t, Options{Exports: newShelf(nil), HandshakeTimeout: 50 * time.Millisecond})
	dialRaw(t, addr).wantSilentEnd() // reads the greeting, says nothing
	c := dial(t, addr)
	c.sendOption(NBD_OPT_LIST, 100, []byte("some of it"))
	c.wantEnd()
}

// wantSilentEnd is wantEnd after a greeting.
func (c *client) wantSilentEnd() {
	c.t.Helper()
	c.read(make([]byte, 18))
	c.wantEnd()
}

// TestIdleTimeout checks that a silent client is dropped, but not one whose
// request takes its time.
func TestIdleTimeout(t *testing.T) {
	dev, entered, release := gated("flush")
	_, addr := startServer(t, Options{Exports: newShelf(map[string]Device{"disk": dev}), IdleTimeout: 50 * time.Millisecond})
	idle, busy := connect(t, addr, simple, "disk"), connect(t, addr, simple, "disk")
	x := busy.start(request{typ: NBD_CMD_FLUSH}, nil)
	<-entered
	<-idle.ended
	time.Sleep(200 * time.Millisecond) // busy could be taken for idle now
	busy.want(request{typ: NBD_CMD_READ, n: 512}, nil, 0)
	close(release)
	if <-x.done; x.err != nil {
		t.Errorf("request in flight: %v", x.err)
	}
	<-busy.ended
}

// TestIdleReader checks that a client that takes none of its replies is dropped
// after the same time, and that what it asked for by then is not read for
// nobody.
func TestIdleReader(t *testing.T) {
	dev := newMemory(8 << 20)
	dev.data[0] = 1
	var reads atomic.Int64
	dev.before = func(string, int64, int64) error { reads.Add(1); return nil }
	exports := newShelf(map[string]Device{"disk": dev})
	_, addr := startServer(t, Options{Exports: exports, IdleTimeout: 50 * time.Millisecond})
	flood(t, silent(t, addr), (&client{}).appendRequest(nil, request{typ: NBD_CMD_READ, flags: NBD_CMD_FLAG_DF, n: 4 << 20}))
	exports.waitReleased("disk")
	if got := reads.Load(); got > 500 { // the input has room for 2340 requests
		t.Errorf("reads\n got %d\nwant few", got)
	}
}

// TestSeveralListeners serves unix and TCP at once.
func TestSeveralListeners(t *testing.T) {
	s, unix := startServer(t, Options{Exports: newShelf(map[string]Device{"disk": newMemory(4096)})})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	serve(t, s, l, s.Serve)
	a, b := connect(t, unix, simple, "disk"), connect(t, l.Addr(), simple, "disk")
	for _, c := range []*client{a, b} {
		c.want(request{typ: NBD_CMD_READ, n: 4096}, nil, 0)
	}
	var peers []string
	for _, c := range s.Clients() {
		peers = append(peers, c.Peer)
	}
	slices.Sort(peers)
	if len(peers) != 2 || !strings.HasPrefix(peers[0], "127.0.0.1:") || !strings.HasPrefix(peers[1], "pid ") {
		t.Errorf("peers\n got %q\nwant one of 127.0.0.1 and one with a pid", peers)
	}
}

// TestServeEnds checks that Serve returns when its context ends, with no error,
// and leaves the connections alone; and with an error if the listener fails.
func TestServeEnds(t *testing.T) {
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	s := NewServer(Options{Exports: newShelf(map[string]Device{"disk": newMemory(4096)})})
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error)
	go func() { served <- s.Serve(ctx, l) }()
	c := connect(t, l.Addr(), simple, "disk")
	cancel()
	if err := <-served; err != nil {
		t.Errorf("Serve after its context has ended\n got %v\nwant nil", err)
	}
	c.want(request{typ: NBD_CMD_READ, n: 4096}, nil, 0)
	if err := s.Serve(context.Background(), l); err == nil {
		t.Error("Serve of a closed listener returned nil")
	}
	if err := s.Shutdown(soon(t)); err != nil {
		t.Errorf("Shutdown: %v", err)
	}
	if err := s.Serve(context.Background(), l); err != nil {
		t.Errorf("Serve after Shutdown\n got %v\nwant nil", err)
	}
}

// failingListener has no file descriptors twice, then a connection.
type failingListener struct {
	net.Listener
	left int
}

func (l *failingListener) Accept() (net.Conn, error) {
	if l.left--; l.left >= 0 {
		return nil, syscall.EMFILE
	}
	return l.Listener.Accept()
}

func TestServeGoesOnWithoutDescriptors(t *testing.T) {
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	s := NewServer(Options{Exports: newShelf(map[string]Device{"disk": newMemory(4096)})})
	serve(t, s, &failingListener{l, 2}, s.Serve)
	connect(t, l.Addr(), simple, "disk").disconnect()
}

// TestLog checks that a session's life is logged, and requests at Debug.
func TestLog(t *testing.T) {
	var out lockedBuffer
	log := slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: slog.LevelDebug}))
	exports := newShelf(map[string]Device{"disk": &tryMemory{memory: newMemory(1 << 20)}})
	s, addr := startServer(t, Options{Exports: exports, Log: log})
	c := connect(t, addr, structured, "disk")
	for range 3 {
		c.want(request{typ: NBD_CMD_READ, n: 4096}, nil, 0)
		c.want(request{typ: NBD_CMD_WRITE, n: 200 << 10}, make([]byte, 200<<10), 0)
	}
	c.want(request{typ: NBD_CMD_TRIM, off: 1 << 20, n: 1}, nil, NBD_EINVAL)
	c.disconnect()
	if err := s.Shutdown(soon(t)); err != nil {
		t.Fatal(err)
	}
	for want, n := range map[string]int{
		"msg=connected export=disk client=\"pid ": 1, "msg=disconnected": 1, "msg=request": 7, "n=4096": 3, "n=204800": 3,
		"err=\"beyond the end of the export\"": 1,
	} {
		if got := strings.Count(out.String(), want); got != n {
			t.Errorf("log lines with %q\n got %d\nwant %d\n%s", want, got, n, out.String())
		}
	}
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}
