// Replies to reads: data, and holes instead of zeroes.
//
// A hole is found by looking at what was read. That needs no question to the
// Device, is right whatever else writes meanwhile, and costs nothing where
// there is data: its first bytes say so.

package intercept

import "bytes"

// holeSize is the shortest run of zeroes that is sent as a hole, in bytes, and
// what the offsets of holes are multiples of.
const holeSize = 64 << 10

var zeroes [holeSize]byte

// fillData makes the data in j's buffer a reply. Headers are put in front of
// the data: into the headroom, or into the zeroes that are not sent. done is
// NBD_REPLY_FLAG_DONE if the reply ends with it.
func (j *job) fillData(done uint16) {
	b, st := j.buf, j.s.style
	head := st.headSize()
	for i := int64(0); i < j.n; {
		end, zero := j.nextRun(i)
		flags := uint16(0)
		if end == j.n {
			flags = done
		}
		at := b.head + i
		if zero {
			p := appendHole(b.mem[at:at], st, &j.q, flags, j.off+i, end-i)
			b.parts = append(b.parts, p)
		} else {
			appendDataHead(b.mem[at-head:at-head], st, &j.q, flags, j.off+i, end-i)
			b.addData(at-head, at, b.head+end)
		}
		i = end
	}
}

// nextRun returns the end of the run of data or zeroes that begins at i.
func (j *job) nextRun(i int64) (end int64, zero bool) {
	if j.s.style == simple || j.q.flags&NBD_CMD_FLAG_DF != 0 {
		return j.n, false
	}
	end, zero = j.nextBlock(i)
	for end < j.n {
		e, z := j.nextBlock(end)
		if z != zero {
			break
		}
		end = e
	}
	return end, zero
}

// nextBlock returns the end of the block that begins at i and whether it is a
// whole one of zeroes.
func (j *job) nextBlock(i int64) (end int64, zero bool) {
	end = min(j.n, i+holeSize-(j.off+i)%holeSize)
	p := j.buf.data(end)[i:]
	return end, bytes.Equal(p, zeroes[:])
}
