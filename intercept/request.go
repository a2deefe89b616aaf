// Requests: their headers, and the one door that all of them pass.

package intercept

import (
	"encoding/binary"
	"math"
	"syscall"
)

// request is the header of a request, of either form.
type request struct {
	flags  uint16
	typ    uint16
	cookie uint64
	off    uint64 // bytes
	n      uint64 // bytes: of the export, or of the payload where it has one

	// contexts are the metadata contexts that a BLOCK_STATUS request asks
	// for: a bit for each id.
	contexts uint32
}

// parseRequest reads a header of the form that was negotiated from p, which
// holds a whole one. It returns false if its magic is not right.
func parseRequest(p []byte, st style) (q request, ok bool) {
	magic := binary.BigEndian.Uint32(p)
	q = request{
		flags:  binary.BigEndian.Uint16(p[4:]),
		typ:    binary.BigEndian.Uint16(p[6:]),
		cookie: binary.BigEndian.Uint64(p[8:]),
		off:    binary.BigEndian.Uint64(p[16:]),

		contexts: math.MaxUint32,
	}
	if st == extended {
		q.n = binary.BigEndian.Uint64(p[24:])
		return q, magic == NBD_EXTENDED_REQUEST_MAGIC
	}
	q.n = uint64(binary.BigEndian.Uint32(p[24:]))
	return q, magic == NBD_REQUEST_MAGIC
}

// payload is how many bytes follow the header.
func (q *request) payload(st style) uint64 {
	if st == extended && q.flags&NBD_CMD_FLAG_PAYLOAD_LEN != 0 || st != extended && q.typ == NBD_CMD_WRITE {
		return q.n
	}
	return 0
}

// commands says of each command which flags it knows and whether it changes
// the export. FUA "is valid for all commands".
var commands = [...]struct {
	flags  uint16
	writes bool
}{
	NBD_CMD_READ:         {flags: NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_DF},
	NBD_CMD_WRITE:        {flags: NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_PAYLOAD_LEN, writes: true},
	NBD_CMD_FLUSH:        {flags: NBD_CMD_FLAG_FUA},
	NBD_CMD_TRIM:         {flags: NBD_CMD_FLAG_FUA, writes: true},
	NBD_CMD_CACHE:        {flags: NBD_CMD_FLAG_FUA},
	NBD_CMD_WRITE_ZEROES: {flags: NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO, writes: true},
	NBD_CMD_BLOCK_STATUS: {flags: NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_REQ_ONE | NBD_CMD_FLAG_PAYLOAD_LEN},
}

// What the server refuses by itself, with the errors of section "Error values".
var (
	errUnknownCommand = &refusal{"unknown command", syscall.EINVAL}
	errUnknownFlag    = &refusal{"flag not valid for this command", syscall.EINVAL}
	errReadOnly       = &refusal{"export is read-only", syscall.EPERM}
	errBeyondEnd      = &refusal{"beyond the end of the export", syscall.EINVAL}
	errNoSpace        = &refusal{"beyond the end of the export", syscall.ENOSPC}
	errTooLong        = &refusal{"longer than the maximum payload size", syscall.EINVAL}
	errReadTooLong    = &refusal{"longer than the maximum payload size", syscall.EOVERFLOW}
	errFlushRange     = &refusal{"flush of a range", syscall.EINVAL}
	errNoPayloadFlag  = &refusal{"write without NBD_CMD_FLAG_PAYLOAD_LEN", syscall.EINVAL}
	errGone           = &refusal{"export is gone", syscall.ESHUTDOWN}
	errStopping       = &refusal{"server is stopping", syscall.ESHUTDOWN}
)

// check returns nil if q may go to the Device, and otherwise why it may not
// (invariant 1). What it lets through lies within the export; its length may
// be 0, but not for NBD_CMD_BLOCK_STATUS.
func (s *session) check(q *request) error {
	if s.server.stopping.Load() {
		return errStopping
	}
	if int(q.typ) >= len(commands) {
		return errUnknownCommand
	}
	cmd := commands[q.typ]
	if q.flags&^(cmd.flags&s.flags) != 0 {
		return errUnknownFlag
	}
	if cmd.writes && s.readOnly {
		return errReadOnly
	}
	switch q.typ {
	case NBD_CMD_FLUSH:
		if q.off != 0 || q.n != 0 {
			return errFlushRange
		}
		return nil
	case NBD_CMD_BLOCK_STATUS:
		if len(s.contexts) == 0 {
			return errNoContext
		}
		if q.n == 0 {
			return errNoLength // a reply describes at least one extent
		}
	case NBD_CMD_READ:
		if q.n > maxPayload {
			// A client that understands chunks is told to ask for less;
			// NBD_EOVERFLOW is not meant for others.
			if s.style == simple {
				return errTooLong
			}
			return errReadTooLong
		}
	case NBD_CMD_WRITE:
		if s.style == extended && q.flags&NBD_CMD_FLAG_PAYLOAD_LEN == 0 {
			return errNoPayloadFlag
		}
		if q.n > maxPayload {
			return errTooLong
		}
	}
	if q.off > s.size || q.n > s.size-q.off {
		if q.typ == NBD_CMD_WRITE || q.typ == NBD_CMD_WRITE_ZEROES {
			return errNoSpace
		}
		return errBeyondEnd
	}
	return nil
}
