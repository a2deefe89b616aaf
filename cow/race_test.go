//go:build race

package cow

// racing says that the race detector watches.
const racing = true
