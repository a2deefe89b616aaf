package intercept

import (
	"bytes"
	"context"
	"errors"
	"net"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"
)

// stuck is memory whose TryWrite at byte 0 hangs until the test lets it go.
type stuck struct {
	*memory
	entered chan func(rest func() error) // what TryWrite was given
	release chan struct{}                // closed: it returns ErrTaken
	finish  chan error                   // what rest ends with, when nil after the write
	left    chan struct{}                // one for each TryWrite that returned ErrTaken
	payload []byte                       // of the write that hangs
}

func newStuck() *stuck {
	return &stuck{newMemory(8 << 20), make(chan func(func() error), 1), make(chan struct{}),
		make(chan error, 1), make(chan struct{}, 1), nil}
}

func (k *stuck) TryRead(p []byte, off int64) error { return k.Read(p, off) }

func (k *stuck) TryWrite(p []byte, off int64, taken func(func() error)) error {
	if off != 0 {
		return k.Write(p, off, false)
	}
	k.payload = p
	k.entered <- taken
	<-k.release
	defer func() { k.left <- struct{}{} }()
	return ErrTaken
}

// rest is what is left of the write.
func (k *stuck) rest() error {
	if err := <-k.finish; err != nil {
		return err
	}
	return k.Write(k.payload, 0, false)
}

// corked keeps what is written to it.
type corked struct {
	net.Conn
	held []byte
}

func (c *corked) Write(p []byte) (int, error) {
	c.held = append(c.held, p...)
	return len(p), nil
}

// readers is how many readers of sessions there are.
func readers() int {
	b := make([]byte, 1<<20)
	return strings.Count(string(b[:runtime.Stack(b, true)]), "(*session).runReader(")
}

// waitReaders returns when there are n.
func waitReaders(t *testing.T, n int) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); readers() != n; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("readers\n got %d\nwant %d", readers(), n)
		}
	}
}

// TestWriteIsTaken has a write taken from its reader, from the input and from a buffer
// of its own: the connection goes on, the write ends when its rest does, and the reader
// that comes back disturbs nobody.
func TestWriteIsTaken(t *testing.T) {
	for _, tc := range []struct {
		name string
		n    int
		err  error
		want uint32
	}{
		{"small", 4096, nil, 0},
		{"as long as the input has it", inPlaceSize, nil, 0},
		{"large", 100 << 10, nil, 0},
		{"fails", 4096, syscall.ENOSPC, NBD_ENOSPC},
		{"large, fails", 100 << 10, syscall.EIO, NBD_EIO},
	} {
		for _, st := range styles {
			t.Run(tc.name+"/"+st.String(), func(t *testing.T) {
				k := newStuck()
				s, addr := startServer(t, Options{Exports: newShelf(map[string]Device{"disk": k})})
				before := readers()
				c := connect(t, addr, st, "disk")
				payload := bytes.Repeat([]byte{7}, tc.n)
				// What comes behind it is in the input when it is taken, the end of it on its way.
				cork := &corked{Conn: c.conn}
				c.conn = cork
				w := c.start(request{typ: NBD_CMD_WRITE, n: uint64(tc.n)}, payload)
				behind := c.start(request{typ: NBD_CMD_READ, off: 1 << 20, n: 4096}, nil)
				write := c.start(request{typ: NBD_CMD_WRITE, off: 2 << 20, n: 4096}, bytes.Repeat([]byte{8}, 4096))
				c.conn = cork.Conn
				c.write(cork.held[:len(cork.held)-1000])
				taken := <-k.entered
				taken(k.rest)
				c.write(cork.held[len(cork.held)-1000:])
				for _, x := range []*exchange{behind, write} {
					if <-x.done; x.err != nil || x.errno != 0 {
						t.Errorf("a request behind the write\n got %d, %v\nwant success", x.errno, x.err)
					}
				}
				for n := range 40 { // more than the input holds
					c.want(request{typ: NBD_CMD_WRITE, off: 3 << 20, n: 4096}, bytes.Repeat([]byte{byte(n)}, 4096), 0)
				}
				c.want(request{typ: NBD_CMD_FLUSH}, nil, 0)
				select {
				case <-w.done:
					t.Error("the write was answered before it had ended")
				default:
				}
				k.finish <- tc.err
				if <-w.done; w.err != nil || w.errno != tc.want {
					t.Errorf("the write\n got %d, %v\nwant %d", w.errno, w.err, tc.want)
				}
				got := k.content()
				if tc.err == nil && !bytes.Equal(got[:tc.n], payload) {
					t.Error("the write wrote other bytes than it was sent")
				}
				if got[2<<20] != 8 || got[3<<20] != 39 {
					t.Error("the writes after it wrote other bytes than they were sent")
				}
				close(k.release)
				<-k.left
				waitReaders(t, before+1) // it is gone
				c.want(request{typ: NBD_CMD_READ, n: 4096}, nil, 0)
				c.disconnect()
				if got := s.spares.Load(); got != totalSpares {
					t.Errorf("spares at the end\n got %d\nwant %d", got, totalSpares)
				}
			})
		}
	}
}

// TestTakenBeyondWorkers has a write taken while all workers wait for what it holds:
// what is left of it does not wait for them.
func TestTakenBeyondWorkers(t *testing.T) {
	k := newStuck()
	waiting, proceed := make(chan struct{}, 1000), make(chan struct{})
	k.before = func(op string, off, _ int64) error {
		if op == "flush" {
			waiting <- struct{}{}
			<-proceed
		}
		return nil
	}
	s, addr := startServer(t, Options{Exports: newShelf(map[string]Device{"disk": k})})
	s.spares.Store(0)
	c := connect(t, addr, structured, "disk")
	var all []*exchange
	for range maxWorkers {
		all = append(all, c.start(request{typ: NBD_CMD_FLUSH}, nil))
		<-waiting
	}
	for range 10 {
		all = append(all, c.start(request{typ: NBD_CMD_FLUSH}, nil))
	}
	w := c.start(request{typ: NBD_CMD_WRITE, n: 4096}, make([]byte, 4096))
	(<-k.entered)(k.rest)
	k.finish <- nil
	if <-w.done; w.err != nil || w.errno != 0 {
		t.Errorf("the write\n got %d, %v\nwant success", w.errno, w.err)
	}
	close(proceed)
	for _, x := range all {
		<-x.done
	}
	close(k.release)
	<-k.left
	c.disconnect()
	if got := s.spares.Add(totalSpares); got != totalSpares {
		t.Errorf("spares at the end\n got %d\nwant %d", got, totalSpares)
	}
}

// TestEndWhileTaken ends the connection in each way while a write is taken and its
// reader hangs: the export is released when the write has ended, whenever the reader
// comes back.
func TestEndWhileTaken(t *testing.T) {
	for _, tc := range []struct {
		name     string
		end      func(t *testing.T, s *Server, c *client) chan error
		answered bool
	}{
		{"disconnect", func(t *testing.T, s *Server, c *client) chan error {
			c.write(c.appendRequest(nil, request{typ: NBD_CMD_DISC}))
			return nil
		}, true},
		{"the client is gone", func(t *testing.T, s *Server, c *client) chan error {
			c.conn.Close()
			return nil
		}, false},
		{"Disconnect", func(t *testing.T, s *Server, c *client) chan error {
			done := make(chan error, 1)
			go func() { done <- s.Disconnect(soon(t), "disk") }()
			<-c.ended
			return done
		}, false},
		{"Shutdown", func(t *testing.T, s *Server, c *client) chan error {
			done := make(chan error, 1)
			go func() { done <- s.Shutdown(soon(t)) }()
			for !s.stopping.Load() {
				time.Sleep(time.Millisecond)
			}
			return done
		}, true},
		{"Shutdown that cuts off", func(t *testing.T, s *Server, c *client) chan error {
			ctx, cancel := context.WithCancel(context.Background())
			cancel()
			if err := s.Shutdown(ctx); !errors.Is(err, context.Canceled) {
				t.Errorf("Shutdown\n got %v\nwant %v", err, context.Canceled)
			}
			<-c.ended
			return nil
		}, false},
	} {
		for _, early := range []bool{false, true} {
			name := tc.name
			if early {
				name += ", before it is taken"
			}
			t.Run(name, func(t *testing.T) {
				k := newStuck()
				exports := newShelf(map[string]Device{"disk": k})
				s, addr := startServer(t, Options{Exports: exports})
				before := readers()
				c := connect(t, addr, structured, "disk")
				w := c.start(request{typ: NBD_CMD_WRITE, n: 4096}, bytes.Repeat([]byte{7}, 4096))
				taken := <-k.entered
				if !early {
					taken(k.rest)
				}
				ended := tc.end(t, s, c)
				if early {
					taken(k.rest)
				}
				if got := exports.users("disk"); got != 1 {
					t.Errorf("uses while a write is taken\n got %d\nwant 1", got)
				}
				k.finish <- nil
				if <-w.done; (w.err == nil && w.errno == 0) != tc.answered {
					t.Errorf("the write: got %d, %v; want an answer: %t", w.errno, w.err, tc.answered)
				}
				exports.waitReleased("disk")
				if ended != nil {
					if err := <-ended; err != nil {
						t.Error(err)
					}
				}
				if got := k.content()[:4096]; !bytes.Equal(got, bytes.Repeat([]byte{7}, 4096)) {
					t.Error("the write is not in the device")
				}
				waitReaders(t, before+1) // the one that hangs
				close(k.release)
				<-k.left
				waitReaders(t, before)
			})
		}
	}
}

// TestIdleWhileTaken checks that a connection with a write that was taken is not idle.
func TestIdleWhileTaken(t *testing.T) {
	k := newStuck()
	_, addr := startServer(t, Options{Exports: newShelf(map[string]Device{"disk": k}), IdleTimeout: 10 * time.Millisecond})
	c := connect(t, addr, structured, "disk")
	w := c.start(request{typ: NBD_CMD_WRITE, n: 4096}, make([]byte, 4096))
	(<-k.entered)(k.rest)
	select {
	case <-c.ended:
		t.Error("the connection ended while a write was in the device")
	case <-time.After(50 * time.Millisecond):
	}
	k.finish <- nil
	if <-w.done; w.err != nil || w.errno != 0 {
		t.Errorf("the write\n got %d, %v\nwant success", w.errno, w.err)
	}
	<-c.ended // now it is
	close(k.release)
	<-k.left
}

// TestPiecesAreNotTaken checks that a write which is split is never tried with a taker:
// who makes the pieces has more to do.
func TestPiecesAreNotTaken(t *testing.T) {
	k := &asked{memory: newMemory(8 << 20)}
	_, addr := startServer(t, Options{Exports: newShelf(map[string]Device{"disk": k}), MaxConns: 1, MemoryBudget: 1})
	c := connect(t, addr, structured, "disk")
	c.want(request{typ: NBD_CMD_WRITE, n: 1 << 20}, make([]byte, 1<<20), 0)
	if k.pieces == 0 || k.takers != 0 {
		t.Errorf("pieces tried: %d, with a taker: %d; want some, and none", k.pieces, k.takers)
	}
	c.want(request{typ: NBD_CMD_WRITE, n: 64 << 10}, make([]byte, 64<<10), 0)
	if k.takers != 1 {
		t.Errorf("a write in one: with a taker %d, want 1", k.takers)
	}
	c.disconnect()
}

// asked counts what its TryWrite is asked.
type asked struct {
	*memory
	pieces, takers int
}

func (a *asked) TryWrite(p []byte, off int64, taken func(func() error)) error {
	if a.pieces++; taken != nil {
		a.takers++
	}
	return a.Write(p, off, false)
}
