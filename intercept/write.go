// WRITE.

package intercept

import "errors"

// inPlaceSize is the longest payload that is written right from the input, in
// bytes.
const inPlaceSize = 32 << 10

// write serves a write of 1 to maxPayload bytes that has entered the lease. It
// returns an error only if the payload cannot be read to its end.
func (s *session) write(q *request) error {
	n := int64(q.n)
	if s.tryWrite != nil && n <= inPlaceSize && q.flags&NBD_CMD_FLAG_FUA == 0 {
		if done, err := s.writeSmall(q); done || err != nil {
			return err
		}
	}
	return s.split(q, (*session).startWrite)
}

// writeSmall writes a payload from the input if that can be done at once. It
// returns false if it cannot; the payload is then still to be read.
func (s *session) writeSmall(q *request) (done bool, err error) {
	n, off := int(q.n), int64(q.off)
	if s.w-s.r < n {
		if err := s.fill(n); err != nil {
			s.lease.leave()
			return false, err
		}
	}
	s.small = *q
	err = s.tryWrite.TryWrite(s.input[s.r:s.r+n:s.r+n], off, s.taken)
	switch {
	case isWouldBlock(err):
		return false, nil
	case err == ErrTaken:
		return false, err
	}
	s.r += n
	s.lease.leave()
	s.answer(q, err, off)
	return true, nil
}

// startWrite reads the payload of j and begins to write it, with a buffer of
// size bytes, which have been taken.
func (s *session) startWrite(j *job, size int64) error {
	j.buf = newBuffer(s.account, size)
	if err := s.readFull(j.buf.data(j.n)); err != nil {
		j.end(err, reader)
		return err
	}
	if s.tryWrite != nil && j.q.flags&NBD_CMD_FLAG_FUA == 0 {
		if err := s.tryStarted(j); !isWouldBlock(err) {
			if err == ErrTaken {
				return err
			}
			j.end(err, reader)
			return nil
		}
	}
	s.dispatch(j)
	return nil
}

// tryStarted writes the payload of j if that can be done at once.
func (s *session) tryStarted(j *job) error {
	taken := s.taken
	if j.whole != nil {
		taken = nil // who makes the pieces has more to do than the next request
	}
	s.started = j
	err := s.tryWrite.TryWrite(j.buf.data(j.n), j.off, taken)
	if err != ErrTaken {
		s.started = nil
	}
	return err
}

// goOn is called when a write has been taken from the reader, which hangs in it and
// touches nothing of the session any more: another reader takes its place, and a worker
// the write. It is called from a goroutine of the Device.
func (s *session) goOn(rest func() error) {
	j := s.started
	if s.started = nil; j == nil {
		// The payload is in the input, whose rest goes on in another.
		j = newJob(s, &s.small)
		was := s.input[s.r+int(j.n) : s.w]
		s.input = make([]byte, inputSize)
		s.r, s.w = 0, copy(s.input, was)
	}
	j.rest = rest
	s.pool.doNow(j)
	go s.runReader()
}

// isWouldBlock says that a Try method has left the request to be done.
func isWouldBlock(err error) bool {
	return err == ErrWouldBlock || err != nil && errors.Is(err, ErrWouldBlock)
}
