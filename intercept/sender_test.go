package intercept

import (
	"bytes"
	"errors"
	"sync"
	"testing"
	"time"
)

// gateConn is a connection whose writes wait for the test.
type gateConn struct {
	tape
	entered chan []byte // what is about to be written
	proceed chan error
	closed  chan struct{}
}

func newGateConn() *gateConn {
	return &gateConn{entered: make(chan []byte), proceed: make(chan error), closed: make(chan struct{}, 10)}
}

func (c *gateConn) Write(p []byte) (int, error) {
	c.entered <- bytes.Clone(p)
	if err := <-c.proceed; err != nil {
		return 0, err
	}
	return len(p), nil
}

func (c *gateConn) Close() error { c.closed <- struct{}{}; return nil }

// reply is a buffer to be sent.
func reply(home chan *buffer, text string) *buffer {
	b := &buffer{mem: []byte(text), home: home}
	b.parts = append(b.parts, b.mem)
	return b
}

// TestSenderCollects holds the writer in a write: nobody else waits, and what
// they leave goes out in order, small replies after the data before them.
func TestSenderCollects(t *testing.T) {
	conn, home := newGateConn(), make(chan *buffer, 10)
	w := newSender(conn, 0)
	var wg sync.WaitGroup
	wg.Go(func() { w.send(reply(home, "first")) })
	if got := <-conn.entered; string(got) != "first" {
		t.Fatalf("first write\n got %q\nwant %q", got, "first")
	}
	w.sendSmall([]byte("small "))
	w.send(reply(home, "second"), reply(home, "third"))
	w.sendSmall([]byte("smaller"))
	conn.proceed <- nil
	for _, want := range []string{"second", "third", "small smaller"} { // a tape has no writev
		if got := <-conn.entered; string(got) != want {
			t.Errorf("next write\n got %q\nwant %q", got, want)
		}
		conn.proceed <- nil
	}
	wg.Wait()
	if got := len(home); got != 3 {
		t.Errorf("buffers given back\n got %d\nwant 3", got)
	}
}

// TestSenderFails breaks the connection: it is closed, and all that is sent
// later is only given back.
func TestSenderFails(t *testing.T) {
	conn, home := newGateConn(), make(chan *buffer, 10)
	w := newSender(conn, 0)
	var wg sync.WaitGroup
	wg.Go(func() { w.send(reply(home, "first")) })
	<-conn.entered
	w.send(reply(home, "second"))
	conn.proceed <- errors.New("broken")
	<-conn.closed
	wg.Wait()
	w.send(reply(home, "third"))
	w.sendSmall([]byte("small"))
	w.exclusive()
	if w.writeNow([]byte("stream")) {
		t.Error("writeNow wrote to a broken connection")
	}
	w.done()
	if got := len(home); got != 3 {
		t.Errorf("buffers given back\n got %d\nwant 3", got)
	}
}

// TestSenderExclusive checks that nothing gets between the parts of a stream.
func TestSenderExclusive(t *testing.T) {
	conn, home := newGateConn(), make(chan *buffer, 10)
	w := newSender(conn, 0)
	var wg sync.WaitGroup
	wg.Go(func() { w.send(reply(home, "before")) })
	<-conn.entered
	wg.Go(func() {
		w.exclusive()
		w.writeNow([]byte("one"))
		w.send(reply(home, "between"))
		w.writeNow([]byte("two"))
		w.done()
	})
	select {
	case got := <-conn.entered:
		t.Fatalf("%q was written beside another write", got)
	case <-time.After(50 * time.Millisecond):
	}
	conn.proceed <- nil
	for _, want := range []string{"one", "two", "between"} {
		if got := <-conn.entered; string(got) != want {
			t.Errorf("next write\n got %q\nwant %q", got, want)
		}
		conn.proceed <- nil
	}
	wg.Wait()
}
