// Specs: how a user names a part of the snapstore.

package store

import (
	"errors"
	"fmt"
	"strings"
)

// A Kind says what a part is made of.
type Kind string

// The kinds of part.
const (
	Mem  Kind = "mem"
	File Kind = "file"
	Dev  Kind = "dev"
)

// A Spec names a part: mem[:LIMIT], file:PATH[:LIMIT] or dev:PATH.
type Spec struct {
	Kind  Kind
	Path  string // empty for mem
	Limit int64  // bytes of blocks in use at most; 0: the kind's default
}

// ParseSpec reads a Spec. LIMIT is what follows the last colon if it is a size;
// a file whose name ends like that is named with a limit after it.
func ParseSpec(s string) (Spec, error) {
	kind, rest, found := strings.Cut(s, ":")
	spec := Spec{Kind: Kind(kind)}
	var err error
	switch spec.Kind {
	case Mem:
		if found {
			spec.Limit, err = parseLimit(rest)
		}
	case File:
		spec.Path, spec.Limit, err = cutLimit(rest)
	case Dev:
		spec.Path = rest
	default:
		err = errors.New("it is none of mem[:LIMIT], file:PATH[:LIMIT] and dev:PATH")
	}
	if err == nil && spec.Kind != Mem && spec.Path == "" {
		err = errors.New("it names no path")
	}
	if err != nil {
		return Spec{}, fmt.Errorf("snapstore %q: %w", s, err)
	}
	return spec, nil
}

// cutLimit splits PATH[:LIMIT]. A last word that begins like a number but is no
// size is more likely a limit with a slip in it than a path.
func cutLimit(s string) (path string, limit int64, err error) {
	i := strings.LastIndexByte(s, ':')
	if i < 0 || i+1 == len(s) || strings.IndexByte("+-.0123456789", s[i+1]) < 0 || strings.Contains(s[i:], "/") {
		return s, 0, nil
	}
	limit, err = parseLimit(s[i+1:])
	return s[:i], limit, err
}

func parseLimit(s string) (int64, error) {
	limit, err := ParseSize(s)
	if err != nil {
		return 0, fmt.Errorf("limit: %w", err)
	}
	return limit, checkLimit(limit)
}

// checkLimit refuses a limit that has no room for one chunk.
func checkLimit(limit int64) error {
	if limit < SlotSize {
		return fmt.Errorf("limit %d is too small: a chunk takes %s", limit, FormatSize(SlotSize))
	}
	return nil
}

// String returns s in the form that ParseSpec reads.
func (s Spec) String() string {
	text := string(s.Kind)
	if s.Kind != Mem {
		text += ":" + s.Path
	}
	if s.Limit != 0 {
		text += ":" + FormatSize(s.Limit)
	}
	return text
}
