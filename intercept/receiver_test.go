package intercept

import (
	"errors"
	"io"
	"net"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// socketPair returns two connected unix sockets.
func socketPair(t *testing.T) (a, b net.Conn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var conns [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socket")
		if conns[i], err = net.FileConn(f); err != nil {
			t.Fatal(err)
		}
		f.Close()
		t.Cleanup(func() { conns[i].Close() })
	}
	return conns[0], conns[1]
}

// TestReceiver follows when a receiver keeps looking for the next request.
func TestReceiver(t *testing.T) {
	defer func(d time.Duration) { lookLimit = d }(lookLimit)
	conn, client := socketPair(t)
	var looking atomic.Bool
	r := newReceiver(conn, &looking)
	send := func() {
		if _, err := client.Write([]byte{7}); err != nil {
			t.Error(err)
		}
	}
	sleeps := 0
	r.try = func(fd uintptr) bool {
		if r.tryRead(fd) {
			return true
		}
		sleeps++
		send() // only now, so that it does sleep
		return false
	}
	read := func(what string, wantWaits, wantSleeps int) {
		t.Helper()
		was := sleeps
		n, err := r.Read(make([]byte, 10))
		if n != 1 || err != nil || r.waits != wantWaits || sleeps-was != wantSleeps {
			t.Errorf("%s: got %d bytes, %v, %d waits, %d sleeps\nwant 1 byte, %d waits, %d sleeps", what, n, err, r.waits, sleeps-was, wantWaits, wantSleeps)
		}
	}
	becomePrompt := func() {
		t.Helper()
		for k := range promptAfter {
			read("a request that is waited for", k+1, 1)
		}
	}

	r.next = true
	lookLimit = time.Minute
	becomePrompt()
	go func() {
		for !looking.Load() {
			time.Sleep(time.Microsecond)
		}
		send()
	}()
	read("looked for", promptAfter+1, 0)
	looking.Store(true)
	read("somebody else looks", promptAfter+2, 1)
	looking.Store(false)
	r.next = false
	lookLimit = 0
	r.waits = 0
	read("a payload", 0, 1)
	r.next = true
	becomePrompt()
	read("late", 0, 1)
	becomePrompt()
	send()
	read("there already", 0, 0)
	if looking.Load() {
		t.Error("still looking")
	}

	r.try = r.tryRead
	conn.SetReadDeadline(time.Now().Add(-time.Second))
	if n, err := r.Read(make([]byte, 10)); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("after the deadline: got %d, %v, want 0, %v", n, err, os.ErrDeadlineExceeded)
	}
	conn.SetReadDeadline(time.Time{})
	client.Close()
	if n, err := r.Read(make([]byte, 10)); n != 0 || err != io.EOF {
		t.Errorf("at the end: got %d, %v, want 0, EOF", n, err)
	}
	conn.Close()
	if n, err := r.Read(make([]byte, 10)); n != 0 || !errors.Is(err, net.ErrClosed) {
		t.Errorf("closed: got %d, %v, want 0, %v", n, err, net.ErrClosed)
	}
}
