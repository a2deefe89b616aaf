// What the reader gets from the socket.

package intercept

import (
	"errors"
	"fmt"
	"io"
	"os"
	"time"
)

const (
	inputSize = 64 << 10 // bytes of requests read at once

	// maxDiscard is how long a payload may be that is too long and still
	// skipped; a longer one ends the connection.
	maxDiscard = 2 * maxPayload

	// lastLook is how long a stopping server waits for requests that are
	// already on their way.
	lastLook = 20 * time.Millisecond
)

var (
	errIdle    = errors.New("idle for too long") // Options.IdleTimeout
	errStopped = errors.New("server stopped")

	errNoReplies = errors.New("client takes no replies")
)

// fill reads until input holds n bytes, at most inputSize.
func (s *session) fill(n int) error {
	s.w = copy(s.input, s.input[s.r:s.w])
	s.r = 0
	for s.w-s.r < n {
		m, err := s.receive(s.receiver, s.input[s.w:])
		s.w += m
		if err != nil {
			if err == io.EOF && s.w > s.r {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
	}
	return nil
}

// readFull fills p with what comes next.
func (s *session) readFull(p []byte) error {
	n := copy(p, s.input[s.r:s.w])
	s.r += n
	for n < len(p) {
		m, err := s.receive(s.conn, p[n:]) // more of it may come for long
		n += m
		if err == io.EOF {
			return io.ErrUnexpectedEOF
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// discard skips n bytes of payload.
func (s *session) discard(n uint64) error {
	if n > maxDiscard || s.style == extended && n > maxPayload {
		return fmt.Errorf("payload of %d bytes", n)
	}
	for n > 0 {
		if s.r == s.w {
			if err := s.fill(1); err != nil {
				return err
			}
		}
		m := min(n, uint64(s.w-s.r))
		s.r += int(m)
		n -= m
	}
	return nil
}

// receive reads some bytes from the socket, through from, at least one if it
// returns nil.
func (s *session) receive(from io.Reader, p []byte) (int, error) {
	s.flush()
	for {
		if idle := s.server.opts.IdleTimeout; idle > 0 {
			s.conn.SetReadDeadline(time.Now().Add(idle))
		}
		// Look after setting the deadline: Shutdown sets one after it has set
		// stopping, so one of us ends this read.
		stopping := s.server.stopping.Load()
		if stopping {
			s.conn.SetReadDeadline(time.Now().Add(lastLook))
		}
		n, err := from.Read(p)
		switch {
		case n > 0:
			return n, nil
		case !errors.Is(err, os.ErrDeadlineExceeded):
			return 0, err
		case stopping && s.lease.idle():
			return 0, errStopped
		case !stopping && !s.server.stopping.Load() && s.lease.idle() && s.sender.quiet():
			return 0, errIdle
		}
	}
}
