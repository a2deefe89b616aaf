// Checkpoints: the change map written down, so that it outlives a loss of power.
//
// A checkpoint
//
//  1. starts the activity of regions anew (regions.go),
//  2. waits for the writes in flight, so that what they marked is in the map,
//  3. syncs the origin: what the map says is there is there,
//  4. writes map, number and identity beside the old ones, syncs, and renames,
//  5. drops the regions from the record that were idle since 1.
//
// A region is dropped only after everything that was ever written to it is on the
// disk and in the map that is on the disk. In whatever order power takes the rest
// away, each block that differs from what a backup of an earlier snapshot saw is
// marked in the map that was written down, or is in a recorded region.
//
// The file, numbers little-endian:
//
//	offset  size  field
//	     0     8  "blksnapM"
//	     8     4  version, 1
//	    12     4  CRC-32C of bytes 0 to 11 and 16 to 511
//	    16    16  generation
//	    32     8  number of the last snapshot
//	    40     8  base
//	    48     8  size of the device in bytes
//	    56     8  tracking block in bytes
//	    64     8  clean: 1 if nothing was written after it
//	    72     8  origin: device number
//	    80     8  origin: inode number, 0 for a block device
//	    88     8  origin: change time, nanoseconds since 1970
//	    96     8  origin: disk sequence number
//	   104    32  origin: fingerprint
//	   136    36  boot id, as text
//	   176     8  length of what follows the header
//	   184     4  CRC-32C of what follows the header
//	   512     …  runs: first block (8), number of blocks n (8), n bytes of the map

package cow

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"

	"github.com/google/uuid"

	"blksnap/cbt"
)

const (
	checkpointMagic   = "blksnapM"
	checkpointVersion = 1
	checkpointHeader  = 512
)

// checkpointInfo is the header of a checkpoint.
type checkpointInfo struct {
	generation   uuid.UUID
	number, base uint64
	block        int64
	clean        bool
	origin       identity
	boot         string
	length       int64
	sum          uint32
}

func (c checkpointInfo) encode(b []byte) {
	le := binary.LittleEndian
	clear(b)
	copy(b, checkpointMagic)
	le.PutUint32(b[8:], checkpointVersion)
	copy(b[16:32], c.generation[:])
	le.PutUint64(b[32:], c.number)
	le.PutUint64(b[40:], c.base)
	le.PutUint64(b[48:], uint64(c.origin.size))
	le.PutUint64(b[56:], uint64(c.block))
	if c.clean {
		b[64] = 1
	}
	le.PutUint64(b[72:], c.origin.dev)
	le.PutUint64(b[80:], c.origin.ino)
	le.PutUint64(b[88:], uint64(c.origin.changed))
	le.PutUint64(b[96:], c.origin.diskSeq)
	copy(b[104:136], c.origin.print[:])
	copy(b[136:172], c.boot)
	le.PutUint64(b[176:], uint64(c.length))
	le.PutUint32(b[184:], c.sum)
	le.PutUint32(b[12:], sumWithout(b))
}

func decodeCheckpoint(b []byte) (c checkpointInfo, err error) {
	le := binary.LittleEndian
	switch {
	case string(b[:8]) != checkpointMagic:
		return c, fmt.Errorf("%w: checkpoint: no magic", ErrDamaged)
	case le.Uint32(b[8:]) != checkpointVersion:
		return c, fmt.Errorf("%w: checkpoint: version %d, this is %d", ErrVersion, le.Uint32(b[8:]), checkpointVersion)
	case le.Uint32(b[12:]) != sumWithout(b):
		return c, fmt.Errorf("%w: checkpoint: checksum of the header", ErrDamaged)
	}
	c = checkpointInfo{
		number: le.Uint64(b[32:]), base: le.Uint64(b[40:]), block: int64(le.Uint64(b[56:])), clean: b[64] == 1,
		origin: identity{
			size: int64(le.Uint64(b[48:])), dev: le.Uint64(b[72:]), ino: le.Uint64(b[80:]),
			changed: int64(le.Uint64(b[88:])), diskSeq: le.Uint64(b[96:]),
		},
		boot: string(b[136:172]), length: int64(le.Uint64(b[176:])), sum: le.Uint32(b[184:]),
	}
	copy(c.generation[:], b[16:32])
	copy(c.origin.print[:], b[104:136])
	return c, nil
}

// writeCheckpoint writes info and the bytes of the map durably to path, in place
// of what is there, or leaves that as it is.
func writeCheckpoint(disk stateDisk, path string, info checkpointInfo, view *cbt.View) error {
	return replaceFile(disk, path, func(f durableFile) error { return info.writeTo(f, view) })
}

// writeTo writes a checkpoint to f, the header last.
func (info checkpointInfo) writeTo(f durableFile, view *cbt.View) (err error) {
	sum := crc32.New(crcTable)
	w := bufio.NewWriterSize(io.MultiWriter(io.NewOffsetWriter(f, checkpointHeader), sum), 1<<20)
	if info.length, err = writeRuns(w, view); err != nil {
		return err
	}
	if err = w.Flush(); err != nil {
		return err
	}
	info.sum = sum.Sum32()
	var b [checkpointHeader]byte
	info.encode(b[:])
	_, err = f.WriteAt(b[:], 0)
	return err
}

// writeRuns writes the parts of the map that are not zero and returns how many
// bytes that took.
func writeRuns(w io.Writer, view *cbt.View) (int64, error) {
	changed, ok := view.Since(view.Base())
	if !ok {
		return 0, errors.New("the change map is lost")
	}
	var length int64
	buf := make([]byte, 64<<10)
	for off, n := range changed {
		from := off / view.BlockSize()
		to := (off + n + view.BlockSize() - 1) / view.BlockSize()
		for from < to {
			m := view.ReadMap(buf[:min(to-from, int64(len(buf)))], from)
			if m == 0 {
				return 0, errors.New("the change map was released")
			}
			var head [16]byte
			binary.LittleEndian.PutUint64(head[:], uint64(from))
			binary.LittleEndian.PutUint64(head[8:], uint64(m))
			if _, err := w.Write(head[:]); err != nil {
				return 0, err
			}
			if _, err := w.Write(buf[:m]); err != nil {
				return 0, err
			}
			from, length = from+int64(m), length+16+int64(m)
		}
	}
	if view.Gone() {
		return 0, errFaulted // and some of it was zeroes
	}
	return length, nil
}

// checkpointFile is a checkpoint that was found.
type checkpointFile struct {
	checkpointInfo
	file durableFile
}

// openCheckpoint opens the checkpoint at path.
func openCheckpoint(disk stateDisk, path string) (*checkpointFile, error) {
	f, err := disk.open(path, false)
	if err != nil {
		return nil, err
	}
	var b [checkpointHeader]byte
	_, err = f.ReadAt(b[:], 0)
	if errors.Is(err, io.EOF) {
		err = fmt.Errorf("%w: checkpoint: cut short", ErrDamaged)
	}
	c := &checkpointFile{file: f}
	if err == nil {
		c.checkpointInfo, err = decodeCheckpoint(b[:])
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return c, nil
}

// load makes the map that was written down in mem, with number as its last
// snapshot's number, which is not below that of the checkpoint.
func (c *checkpointFile) load(mem cbt.Memory, number uint64) (*cbt.Map, error) {
	// First the checksum, so that nothing is marked by a file that is damaged.
	sum := crc32.New(crcTable)
	body := func() *io.SectionReader { return io.NewSectionReader(c.file, checkpointHeader, c.length) }
	if n, err := io.Copy(sum.(hash.Hash), body()); err != nil {
		return nil, err
	} else if n != c.length || sum.Sum32() != c.sum {
		return nil, fmt.Errorf("%w: checkpoint: checksum of the map", ErrDamaged)
	}
	m, err := cbt.Restore(mem, c.origin.size, c.block, c.generation, number, c.base)
	if err != nil {
		return nil, err
	}
	if err := c.mark(m, bufio.NewReaderSize(body(), 1<<20)); err != nil {
		m.Close()
		return nil, err
	}
	if m.Lost() {
		m.Close()
		return nil, errors.New("no memory for the change map")
	}
	return m, nil
}

func (c *checkpointFile) mark(m *cbt.Map, r io.Reader) error {
	buf := make([]byte, 64<<10)
	for {
		var head [16]byte
		if _, err := io.ReadFull(r, head[:]); err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
		block := int64(binary.LittleEndian.Uint64(head[:]))
		n := binary.LittleEndian.Uint64(head[8:])
		if n > uint64(len(buf)) {
			return fmt.Errorf("%w: checkpoint: a run of %d blocks", ErrDamaged, n)
		}
		if _, err := io.ReadFull(r, buf[:n]); err != nil {
			return err
		}
		for i := 0; i < int(n); {
			k := i + 1
			for k < int(n) && buf[k] == buf[i] {
				k++
			}
			m.MarkAt((block+int64(i))*c.block, int64(k-i)*c.block, c.base+uint64(buf[i]))
			i = k
		}
	}
}
