// BLOCK_STATUS.

package intercept

import (
	"encoding/binary"
	"fmt"
	"syscall"
)

const (
	// maxContexts is how many metadata contexts a connection may select.
	maxContexts = 16

	// statusSize is the room for the reply to one request, in bytes; the
	// contexts share it. A reply may cover less than was asked for, the client
	// then asks for the rest.
	statusSize = floorSize

	// maxExtent32 is the longest extent that a structured reply describes, in
	// bytes: fits into 32 bits, and is a multiple of a block.
	maxExtent32 = 1<<32 - 4096
)

// metaContext is a metadata context that a connection selected; its id is its
// index.
type metaContext string

var (
	errContextIDs = &refusal{"bad list of metadata contexts", syscall.EINVAL}
	errNoLength   = &refusal{"block status of no bytes", syscall.EINVAL}
	errNoContext  = &refusal{"no metadata context was negotiated", syscall.EINVAL}
)

// statusPayload reads the payload of a BLOCK_STATUS request, 64 bits of length
// and the ids of the contexts asked for, and puts it into q. It returns refused
// if the payload is not of that form, and err only if it cannot be read.
func (s *session) statusPayload(q *request) (refused, err error) {
	n := q.payload(s.style)
	q.flags &^= NBD_CMD_FLAG_PAYLOAD_LEN // it is read here
	if n < 8+4 || n > 8+4*maxContexts || n%4 != 0 || len(s.contexts) == 0 {
		return errContextIDs, s.discard(n)
	}
	if err := s.fill(int(n)); err != nil {
		return nil, err
	}
	p := s.input[s.r : s.r+int(n)]
	s.r += int(n)
	q.n, q.contexts = binary.BigEndian.Uint64(p), 0
	for p = p[8:]; len(p) > 0; p = p[4:] {
		id := binary.BigEndian.Uint32(p)
		if id >= uint32(len(s.contexts)) || q.contexts&(1<<id) != 0 {
			return errContextIDs, nil
		}
		q.contexts |= 1 << id
	}
	return nil, nil
}

// status makes the reply to a BLOCK_STATUS request in j's buffer: one chunk for
// each context asked for.
func (j *job) status() error {
	var ids []uint32
	for id := range uint32(len(j.s.contexts)) {
		if j.q.contexts&(1<<id) != 0 {
			ids = append(ids, id)
		}
	}
	share := len(j.buf.mem) / len(ids)
	for i, id := range ids {
		done := uint16(0)
		if i == len(ids)-1 {
			done = NBD_REPLY_FLAG_DONE
		}
		p, err := j.statusChunk(j.buf.mem[i*share:i*share:(i+1)*share], id, done)
		if err != nil {
			return err
		}
		j.buf.parts = append(j.buf.parts, p)
	}
	return nil
}

// statusChunk makes the chunk of one context in p, within its capacity.
func (j *job) statusChunk(p []byte, id uint32, flags uint16) ([]byte, error) {
	st := j.s.style
	typ, head, each := NBD_REPLY_TYPE_BLOCK_STATUS, 4, 8
	if st == extended {
		typ, head, each = NBD_REPLY_TYPE_BLOCK_STATUS_EXT, 8, 16
	}
	// The header needs the length of what follows: leave room for it.
	start := len(appendChunk(p, st, &j.q, flags, typ, 0)) + head
	body, err := j.appendExtents(p[start:start], string(j.s.contexts[id]))
	if err != nil {
		return nil, err
	}
	count := len(body) / each
	p = appendChunk(p, st, &j.q, flags, typ, int64(head+len(body)))
	p = binary.BigEndian.AppendUint32(p, id)
	if st == extended {
		p = binary.BigEndian.AppendUint32(p, uint32(count))
	}
	return p[:start+len(body)], nil
}

// appendExtents appends what the Device says of context name to p, as far as
// p's capacity goes. Neighbours with the same flags become one extent.
func (j *job) appendExtents(p []byte, name string) ([]byte, error) {
	var last Extent
	left := j.n // bytes that last does not cover yet
	for e, err := range j.s.mapper.Status(name, j.off, j.n) {
		if err != nil {
			return nil, fmt.Errorf("status %s: %w", name, err)
		}
		if e.Flags != last.Flags && last.N > 0 {
			var more bool
			if p, more = j.appendExtent(p, last); !more {
				return p, nil
			}
			last = Extent{}
		}
		last.N, last.Flags = last.N+e.N, e.Flags
		if left -= e.N; left <= 0 {
			break
		}
	}
	if len(p) == 0 && last.N == 0 {
		return nil, fmt.Errorf("status %s: nothing known at %d", name, j.off)
	}
	p, _ = j.appendExtent(p, last)
	return p, nil
}

// appendExtent appends e and says whether more may follow.
func (j *job) appendExtent(p []byte, e Extent) ([]byte, bool) {
	one := j.q.flags&NBD_CMD_FLAG_REQ_ONE != 0
	if one {
		e.N = min(e.N, j.n)
	}
	if j.s.style == extended {
		p = binary.BigEndian.AppendUint64(p, uint64(e.N))
		p = binary.BigEndian.AppendUint64(p, uint64(e.Flags))
		return p, !one && cap(p)-len(p) >= 16
	}
	n := min(e.N, maxExtent32)
	p = binary.BigEndian.AppendUint32(p, uint32(n))
	p = binary.BigEndian.AppendUint32(p, e.Flags)
	return p, !one && n == e.N && cap(p)-len(p) >= 8
}
