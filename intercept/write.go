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
	err = s.tryWrite.TryWrite(s.input[s.r:s.r+n:s.r+n], off)
	if isWouldBlock(err) {
		return false, nil
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
		if err := s.tryWrite.TryWrite(j.buf.data(j.n), j.off); !isWouldBlock(err) {
			j.end(err, reader)
			return nil
		}
	}
	s.dispatch(j)
	return nil
}

// isWouldBlock says that a Try method has left the request to be done.
func isWouldBlock(err error) bool {
	return err == ErrWouldBlock || err != nil && errors.Is(err, ErrWouldBlock)
}
