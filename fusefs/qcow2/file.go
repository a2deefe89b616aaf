// What a file is, and making one.

package qcow2

import (
	"encoding/binary"
	"hash/maphash"
	"io"
	"iter"
)

// Disk says what image a file shows.
type Disk struct {
	// Size of the image in bytes: a multiple of 512, above 0.
	Size int64

	// Block is the cluster size that is wanted in bytes, a power of two. The
	// file has it within the bounds of the format, or a larger one where QEMU
	// would not open the file.
	Block int64

	// Backing names the raw backing file, in at most 1023 bytes. If it is empty
	// there is none, and what is absent reads as zeroes.
	Backing string
}

// Edition tells one file of a Disk from another without holding it.
type Edition struct {
	Size int64  // of the file in bytes
	Sum  uint64 // of the kinds of all clusters; it is this process's own
}

// File is a file of a Disk. Many goroutines may read it at once.
type File struct {
	disk  Disk
	image io.ReaderAt
	kinds layout
	at    plan
	head  []byte
	parts []part
}

// Measure returns the edition of the file that Make makes of the same runs. It
// takes time for each run, and no memory.
func (d Disk) Measure(runs iter.Seq2[Run, error]) (Edition, error) {
	shift := clusterShift(d.Size, d.Block)
	c := counts{entries: 1 << shift / wordSize}
	sum, err := d.fill(runs, shift, func(s span) error {
		c.add(s)
		return nil
	})
	if err != nil {
		return Edition{}, err
	}
	return Edition{planFor(d.Size, shift, c.tables, c.data).end, sum}, nil
}

// Make makes the file that holds runs, with the bytes of image. The runs are
// ascending, disjoint and within the image. take is asked before n bytes of memory
// are used. What is wrong with runs, or what take answers, is returned.
func (d Disk) Make(image io.ReaderAt, runs iter.Seq2[Run, error], take func(n int64) error) (*File, Edition, error) {
	shift := clusterShift(d.Size, d.Block)
	f := &File{disk: d, image: image}
	f.kinds.entries = 1 << shift / wordSize
	sum, err := d.fill(runs, shift, func(s span) error { return f.kinds.add(s, take) })
	if err != nil {
		return nil, Edition{}, err
	}
	f.at = planFor(d.Size, shift, f.kinds.tables, f.kinds.data)
	f.head = d.header(f.at)
	f.parts = f.split()
	return f, Edition{f.at.end, sum}, nil
}

// sumSeed is what the sums of this process begin with.
var sumSeed = maphash.MakeSeed()

// fill hands the spans of runs to add and returns their sum.
func (d Disk) fill(runs iter.Seq2[Run, error], shift uint, add func(span) error) (uint64, error) {
	var sum maphash.Hash
	sum.SetSeed(sumSeed)
	var b []byte
	for s, err := range spans(runs, d.Size, shift) {
		if err == nil {
			err = add(s)
		}
		if err != nil {
			return 0, err
		}
		b = binary.NativeEndian.AppendUint64(b[:0], uint64(s.from))
		b = binary.NativeEndian.AppendUint64(b, uint64(s.to))
		sum.Write(append(b, byte(s.kind)))
	}
	return sum.Sum64(), nil
}
