// Large requests, in pieces.

package intercept

import (
	"sync"
	"sync/atomic"
)

// pieceSize is what a piece of a request has at most, in bytes. Where memory is
// short it has what fits into a connection's floor.
const pieceSize = 1 << 20

// whole is a request that was split into pieces.
type whole struct {
	left atomic.Int32 // pieces not ended, and one while the reader makes more

	mu  sync.Mutex // protects err and off, the first error and where it was
	err error
	off int64
}

func (w *whole) fail(err error, off int64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err == nil {
		w.err, w.off = err, off
	}
}

// split starts q, a read or write, with as much memory as it can have: in one,
// or in pieces one after the other. start is given a job and the size of the
// buffer that was taken for it; if it fails the rest is not started.
func (s *session) split(q *request, start func(s *session, j *job, size int64) error) error {
	n := int64(q.n)
	got := s.account.take(min(n, pieceSize))
	if got >= n {
		return start(s, newJob(s, q), got)
	}
	w := &whole{}
	w.left.Store(1)
	defer s.endPiece(q, w, reader)
	for off, end := int64(q.off), int64(q.off)+n; ; {
		j := newJob(s, q)
		j.off, j.n, j.whole = off, min(end-off, got), w
		off += j.n
		w.left.Add(1)
		if err := start(s, j, got); err != nil || off == end {
			return err
		}
		got = s.account.take(min(end-off, pieceSize))
	}
}

// endPiece says that a piece of q, or the making of pieces, has ended. The last
// to end answers: after all the data, so that the answer is the reply's end.
func (s *session) endPiece(q *request, w *whole, who caller) {
	if w.left.Add(-1) > 0 {
		return
	}
	s.lease.leave()
	s.reply(q, w.err, w.off, who)
}
