// Changed runs as lines of text.

package fusefs

import (
	"hash/maphash"
	"iter"
	"strconv"
)

// batch is how many bytes of lines are formatted before they are handed on.
const batch = 32 << 10

// sumSeed is what the sums of this process begin with.
var sumSeed = maphash.MakeSeed()

// render writes runs as lines, hands them to emit some at a time, and returns
// the edition of the whole. It stops at the first error of either. emit does not
// keep what it gets.
func render(runs iter.Seq2[Run, error], emit func([]byte) error) (edition, error) {
	var e edition
	var sum maphash.Hash
	sum.SetSeed(sumSeed)
	buf := make([]byte, 0, batch+64)
	flush := func() error {
		sum.Write(buf)
		e.size += int64(len(buf))
		err := emit(buf)
		buf = buf[:0]
		return err
	}
	for r, err := range runs {
		if err != nil {
			return edition{}, err
		}
		if buf = appendRun(buf, r); len(buf) >= batch {
			if err := flush(); err != nil {
				return edition{}, err
			}
		}
	}
	err := flush()
	e.sum = sum.Sum64()
	return e, err
}

// appendRun appends "OFFSET LENGTH KIND\n".
func appendRun(b []byte, r Run) []byte {
	b = strconv.AppendInt(b, r.Off, 10)
	b = append(b, ' ')
	b = strconv.AppendInt(b, r.N, 10)
	if r.Zero {
		return append(b, " zero\n"...)
	}
	return append(b, " data\n"...)
}

// measure returns the edition of the text of runs.
func measure(runs iter.Seq2[Run, error]) (edition, error) {
	return render(runs, func([]byte) error { return nil })
}

// fill returns the text of runs, which the caller frees, and its edition.
func (b *budget) fill(runs iter.Seq2[Run, error]) (*text, edition, error) {
	t := &text{budget: b}
	e, err := render(runs, t.write)
	if err != nil {
		t.free()
		return nil, edition{}, err
	}
	t.trim()
	return t, e, nil
}
